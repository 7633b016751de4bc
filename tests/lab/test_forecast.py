import pytest

from tethertune.lab import comparison_file, forecast


@pytest.fixture
def planned(tiny_inputs, tmp_path):
    """A comparison on the little images, and on a data set that is not here."""

    def make(**train):
        options = "\n".join(
            f"{key} = {value}" for key, value in {"size": 32, "epochs": 2, "threads": 1, **train}.items()
        )
        path = tmp_path / "comparison.toml"
        path.write_text(
            'methods = ["none", "delta"]\nseeds = 3\nretrain_on = "train"\nmodels = ["test_efficientnet"]\n'
            f'[tasks.colours]\ndata = "{tiny_inputs / "colours"}"\n[tasks.pets]\n'
            f"[search]\ntrials = 4\n[sweeps]\nlr = [1, 2]\n[train]\n{options}\n"
        )
        return comparison_file.load(path)

    return make


@pytest.fixture(autouse=True)
def _nothing_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("TETHERTUNE_DATA", str(tmp_path / "data"))


def test_counts_runs_and_images(planned):
    found = {(row.plan.cell.task, row.plan.cell.method): row for row in forecast.estimate(planned())}
    here, away = found["colours", "delta"], found["pets", "delta"]
    assert (here.plan.trial, here.plan.run, here.plan.sweep) == (4, 3, 2)
    assert (here.sizes, here.here) == ({"train": 21, "validation": 9, "test": 9}, True)
    assert (away.sizes, away.here) == ({"train": 2000, "validation": 2000, "test": 3390}, False)
    assert found["colours", "none"].plan.trial == 0


def test_takes_as_long_as_there_are_images_and_epochs(planned):
    def seconds(**train):
        return {(row.plan.cell.task, row.plan.cell.method): row.seconds for row in forecast.estimate(planned(**train))}

    short, long = seconds(eval_every=30), seconds(epochs=20, eval_every=30)
    assert short["pets", "none"] > 10 * short["colours", "none"]
    assert 5 < long["pets", "none"] / short["pets", "none"] <= 10
    assert short["pets", "delta"] > short["pets", "none"]  # trials, and the pre-trained network looks too
    assert seconds(per_class=1, eval_every=30)["pets", "none"] < short["pets", "none"]


def test_the_plan_is_printed_and_nothing_is_made(planned, tethertune, tmp_path):
    planned()
    code, out, _ = tethertune("compare", tmp_path / "comparison.toml", "--dry-run", "--output", tmp_path / "out")
    assert code == 0
    assert "4 cells: 8 trials, 12 runs and 8 runs of curves. About" in out
    assert "2,000, 2,000, 3,390 *" in out
    assert not (tmp_path / "out").exists()
