import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/make_results.py")))


def group(method, mean, difference=None, **others):
    interval = None if difference is None else [difference - 0.01, difference + 0.01]
    minus = (
        None if difference is None else {"mean": difference, "interval": interval, "beyond_noise": difference > 0.01}
    )
    return {
        "method": method,
        "values": {"lr": 0.001, "head_lr": None},
        "accuracies": {"1": mean},
        "mean": mean,
        "deviation": 0.02,
        "minus_none": minus,
        "interpolations": [],
        **others,
    }


def task(name, *methods, sweeps=()):
    return {"task": name, "settings": [{"methods": list(methods)}], "sweeps": list(sweeps)}


def test_the_page_holds_the_recorded_numbers(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.render(page, script.read("comparison"), script.read("curves")) == page


def test_accuracies_ranks_and_differences_are_those_of_the_recording(script):
    tasks = [
        task("easy", group("none", 0.8), group("mars-pgm", 0.9, 0.1)),
        task("hard", group("none", 0.6), group("mars-pgm", 0.6, 0.0)),
    ]
    table = list(script.overview(tasks))
    assert table[0] == "| Task | none | mars-pgm |"
    assert table[2] == "| easy | 80.0 ± 2.0 | 90.0 ± 2.0 |"
    assert table[-1] == "| mean rank | 1.75 | 1.25 |"
    assert list(script.differences(tasks))[2:] == [
        "| easy | **+10.0 (+9.0 to +11.0)** |",
        "| hard | +0.0 (\N{MINUS SIGN}1.0 to +1.0) |",
    ]
    assert list(script.values(tasks))[2] == "| easy | lr 0.001 | lr 0.001 |"


def test_curves_are_means_over_the_seeds(script):
    def point(value, seed, accuracy):
        return {"key": "lr", "method": "none", "value": value, "seed": seed, "accuracy": accuracy}

    swept = task("t", group("none", 0.5), sweeps=[point(0.1, 1, 0.5), point(0.1, 2, 0.7), point(1.0, 1, None)])
    assert list(script.rates([swept, task("other", group("none", 0.5))])) == [
        "t:",
        "",
        "| Learning rate | 0.1 | 1 |",
        "| --- | ---: | ---: |",
        "| none | 60.0 ± 14.1 % | NaN |",
        "",
    ]


def test_the_frontier_is_accuracy_and_retention_by_alpha(script):
    points = [{"alpha": alpha, "accuracy": 0.8, "retention": 1 - alpha / 2} for alpha in (1.0, 0.5)]
    lines = list(script.frontier([task("t", group("none", 0.5, interpolations=points), group("l2-sp", 0.5))]))
    assert lines[2:] == ["| Alpha | 1 | 0.5 |", "| --- | ---: | ---: |", "| none | 80.0 / 50.0 | 80.0 / 75.0 |", ""]
