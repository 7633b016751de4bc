import json
import math

import pytest

from tethertune.lab.report import write


@pytest.fixture
def exported(folders, tmp_path):
    def export():
        path = write([folders.root], tmp_path / "report.json", "json")
        return json.loads(path.read_text(encoding="utf-8"))

    return export


def test_holds_every_accuracy_and_every_difference(folders, exported):
    for seed, (plain, held) in enumerate([(0.6, 0.7), (0.62, 0.72), (0.61, 0.74)], 1):
        folders.add(plain, seed=seed)
        folders.add(held, seed=seed, method="mars-pgm", radius=2.0)
    (task,) = exported()["tasks"]
    assert (task["task"], task["model"], task["data"]["sizes"]["train"]) == ("fashion", "lite0", 100)
    (setting,) = task["settings"]
    assert setting["options"]["head"] == "pool"
    plain, held = setting["methods"]
    assert (plain["method"], plain["minus_none"], plain["best_other"]) == ("none", None, "mars-pgm")
    assert held["accuracies"] == {"1": 0.7, "2": 0.72, "3": 0.74}
    assert held["values"]["radius"] == 2.0
    assert held["mean"] == pytest.approx(0.72)
    assert held["deviation"] == pytest.approx(0.02)
    assert held["minus_none"]["mean"] == pytest.approx(0.11)
    assert held["minus_none"]["interval"] == pytest.approx([0.1, 0.13])
    assert held["minus_none"]["beyond_noise"]


def test_what_is_not_finite_is_null(folders, exported):
    folders.add(math.nan, seed=1)
    (task,) = exported()["tasks"]
    (plain,) = task["settings"][0]["methods"]
    assert plain["accuracies"] == {"1": None}
    assert plain["mean"] is None
    assert plain["deviation"] is None


def test_trials_are_counted_and_curves_listed(folders, exported):
    folders.add(0.6)
    for number in range(3):
        folders.add(0.5, seed=0, lr=0.1 + number, part={"kind": "trial", "study": "s", "number": number})
    for value in (0.1, 10.0):
        folders.add(0.5, method="l2-sp", strength=value, part={"kind": "sweep", "key": "strengths", "value": value})
    (task,) = exported()["tasks"]
    assert task["trials"] == 3
    assert task["sweeps"] == [
        {"key": "strengths", "method": "l2-sp", "value": value, "seed": 1, "accuracy": 0.5} for value in (0.1, 10.0)
    ]
