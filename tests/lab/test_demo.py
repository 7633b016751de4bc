import subprocess
from collections import Counter

import pytest

from tethertune.lab import demo, runs
from tethertune.lab.methods import METHODS


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two short runs in place of the 21."""
    least = {"per_class": 1, "size": 32, "batch_size": 10, "epochs": 1, "cache": str(tmp_path / "cache")}
    monkeypatch.setattr(demo, "_SETTING", demo._SETTING | least)
    monkeypatch.setattr(demo, "_ROWS", (demo._ROWS[0], demo._ROWS[5]))
    monkeypatch.setattr(demo, "SEEDS", (1,))


def test_every_method_runs_with_every_seed_and_a_plain_good_head_beside_them(tmp_path):
    configs = demo.configurations(tmp_path)
    assert len({config.hash for config in configs}) == len(configs) == 21
    assert [config.seed for config in configs] == [1] * 7 + [2] * 7 + [3] * 7
    flattened = Counter((config.method, config.seed) for config in configs if config.head == "flatten")
    assert flattened == Counter((method, seed) for method in METHODS for seed in (1, 2, 3))
    beside = [(config.method, config.lr, config.seed) for config in configs if config.head == "pool"]
    assert beside == [("none", 3e-4, seed) for seed in (1, 2, 3)]
    assert {config.output for config in configs} == {str(tmp_path / "runs")}
    assert {(config.model, config.data, config.threads) for config in configs} == {("lite0", "fashion", 1)}


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_it_prints_the_answer_and_the_table_writes_the_report_and_makes_nothing_twice(tmp_path, capsys):
    output = tmp_path / "demo"
    report = demo.run(output)
    first = capsys.readouterr().out
    assert report == output / "report.html"
    assert report.stat().st_size > 100_000  # the charts' program is in it

    made = runs.find([output / "runs"])
    assert [run.info["config"]["method"] for run in made] == ["mars-pgm", "none"]
    assert all(run.complete for run in made)
    for run in made:
        method, accuracy = run.info["config"]["method"], run.info["outcome"]["test_accuracy"]
        assert f"{method:8} seed 1, flatten head, lr 0.0005 test accuracy {accuracy:.1%}" in first
    table = first.partition("Test accuracy")[2]
    assert "mars-pgm" in table
    assert any(said in table for said in ("over none", "No method beat plain fine-tuning", "below none"))
    assert first.endswith(f"The report, with curves and what each layer did: {report}\n")

    files = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    page = report.read_bytes()
    demo.run(output)
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == files
    assert report.read_bytes() == page
    assert capsys.readouterr().out.partition("Test accuracy")[2] == table


def test_after_an_error_no_more_runs_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_finetune", subprocess.check_call)
    jobs = [["false"], *(["sh", "-c", f"sleep 0.3; touch {tmp_path}/{number}"] for number in range(20))]
    with pytest.raises(subprocess.CalledProcessError):
        list(demo._outcomes(jobs))
    assert len(list(tmp_path.iterdir())) < 10
