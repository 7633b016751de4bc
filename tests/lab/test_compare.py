import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tethertune.lab import compare, comparison_file, runs

SEARCHED = """
methods = ["none", "l2-pgm"]
seeds = 2
retrain_on = "train"
[search]
trials = 3
startup = 2
space = "relative"
tune_lr = true
"""


@pytest.fixture
def made(tiny_inputs, tmp_path):
    """``made(text)`` is a comparison of a network that takes no time on the little images; and its file."""

    def make(text, weights=tiny_inputs / "base.safetensors", **overrides):
        path = tmp_path / "comparison.toml"
        path.write_text(
            f'output = "{tmp_path / "out"}"\nexecutor = "local"\n{text}\n'
            f'[models.tiny]\nmodel = "test_efficientnet"\nweights = "{weights}"\n'
            f'[tasks.colours]\ndata = "{tiny_inputs / "colours"}"\n'
            f'[train]\nsize = 32\nepochs = 2\nbatch_size = 8\nthreads = 1\ncache = "{tiny_inputs / "cache"}"\n'
        )
        return comparison_file.load(path, overrides), path

    return make


class NoView:
    def skip(self, *_):
        pass


def tables(output):
    """What a comparison found: each run by configuration, with its accuracy and where its weights went."""
    return {
        run.info["hash"]: (run.info["part"], run.info["outcome"]["test_accuracy"], run.distances)
        for run in runs.find([output / "runs"])
    }


def test_plans_what_it_then_makes(made, capfd):
    comparison, _ = made(SEARCHED + "[sweeps]\nlr = [0.001, 0.002]\nstrengths = [0.1]\n")
    plans = {plan.cell.method: (plan.trial, plan.run, plan.sweep) for plan in compare.plan(comparison)}
    assert plans == {"none": (3, 2, 2), "l2-pgm": (3, 2, 3)}
    report = compare.run(comparison)
    assert report == comparison.output / "report.html"
    assert len(runs.find([comparison.output / "runs"])) == 4
    assert len(runs.find([comparison.output / "trials"])) == 6
    assert len(runs.find([comparison.output / "sweeps"])) == 5
    told = capfd.readouterr().err
    assert told.count("trial ") == 6
    assert "[15/15" in told
    assert "nothing left" in told


def test_the_best_of_a_search_is_what_is_trained_once_a_seed(made):
    comparison, _ = made(SEARCHED)
    compare.run(comparison, quiet=True)
    for method in ("none", "l2-pgm"):
        trials = [run for run in runs.find([comparison.output / "trials"]) if run.info["config"]["method"] == method]
        best = max(
            trials, key=lambda run: (run.info["outcome"]["validation_accuracy"], -run.info["part"]["number"])
        ).info["config"]
        final = [run for run in runs.find([comparison.output / "runs"]) if run.info["config"]["method"] == method]
        assert [run.info["config"]["seed"] for run in final] == [1, 2]
        for run in final:
            for key in ("lr", "relative_radius", "head_radius"):
                assert run.info["config"][key] == best[key]
        assert {run.info["outcome"]["test_accuracy"] for run in trials} == {None}


def test_what_is_there_is_not_made_again(made, capfd):
    comparison, _ = made(SEARCHED)
    compare.run(comparison, quiet=True)
    files = {path: path.stat().st_mtime_ns for path in comparison.output.rglob("*.json*")}
    page = (comparison.output / "report.html").read_bytes()
    compare.run(comparison)
    assert {path: path.stat().st_mtime_ns for path in comparison.output.rglob("*.json*")} == files
    assert (comparison.output / "report.html").read_bytes() == page
    assert "trial " not in capfd.readouterr().err


def test_more_seeds_and_more_trials_go_on_from_what_is_there(made):
    compare.run(made(SEARCHED)[0], quiet=True)
    more, _ = made(SEARCHED.replace("seeds = 2", "seeds = 3").replace("trials = 3", "trials = 4"))
    compare.run(more, quiet=True)
    assert len(runs.find([more.output / "trials"])) == 8
    assert {run.info["config"]["seed"] for run in runs.find([more.output / "runs"])} == {1, 2, 3}


@pytest.mark.slow
def test_processes_and_one_process_find_the_same(made):
    here, _ = made(SEARCHED)
    compare.run(here, quiet=True)
    there, _ = made(SEARCHED, executor="processes", output=here.output.with_name("there"))
    compare.run(there, quiet=True)
    assert tables(here.output) == tables(there.output)


def test_runs_are_measured_on_the_way_back_to_their_reference(made, knowing):
    comparison, _ = made(
        'methods = ["none"]\nretrain_on = "train"\nseeds = 2\n'
        f'[interpolate]\nalphas = [1, 0.5]\nretain = "{knowing / "images"}"\nretain_size = 32\nseeds = [2]\n',
        weights=knowing / "base.safetensors",
    )
    compare.run(comparison, quiet=True)
    found = {run.info["config"]["seed"]: run.interpolations for run in runs.find([comparison.output / "runs"])}
    assert not found[1]
    assert [line["alpha"] for line in found[2]] == [1.0, 0.5]
    assert all(0 <= line["retention"]["share"] <= 1 for line in found[2])
    jobs = [job for cell in comparison.cells for jobs in compare._course(comparison, cell, NoView()) for job in jobs]
    assert not jobs
    other = replace(comparison, interpolate=replace(comparison.interpolate, retain="other/images"))
    jobs = [job for cell in other.cells for jobs in compare._course(other, cell, NoView()) for job in jobs]
    assert [job.call.args[0].seed for job in jobs] == [2]


def test_a_run_that_diverges_is_told_and_not_made_again(made, capfd):
    comparison, path = made('methods = ["none"]\nseeds = 1\nretrain_on = "train"\n')
    path.write_text(path.read_text() + 'lr = 1e38\noptimizer = "sgd"\n')
    comparison = comparison_file.load(path)
    compare.run(comparison)
    assert "seed 1 diverged" in capfd.readouterr().err
    (run,) = runs.find([comparison.output / "runs"])
    assert run.diverged
    assert not (run.path / "resume").exists()
    before = (run.path / "run.json").stat().st_mtime_ns
    compare.run(comparison)
    assert "diverged" not in capfd.readouterr().err
    assert (run.path / "run.json").stat().st_mtime_ns == before


def test_a_cell_whose_every_trial_diverges_stops_no_other(made, tethertune):
    comparison, path = made(
        'methods = ["none", "l2-pgm"]\nseeds = 1\nretrain_on = "train"\n[search]\ntrials = 2\nstartup = 2\n'
        "[values]\nnone = { lr = 0.001 }\n[sweeps]\nstrengths = [0.1]\n"
    )
    path.write_text(path.read_text() + 'lr = 1e38\noptimizer = "sgd"\n')
    code, out, err = tethertune("compare", path)
    (run,) = runs.find([comparison.output / "runs"])
    assert (run.info["config"]["method"], run.complete) == ("none", True)
    (told,) = compare.lost(comparison_file.load(path))
    assert told.startswith("tiny colours l2-pgm: No trial of study ")
    assert "2 of 2 diverged. Search lower learning rates" in told
    assert code == 1
    assert err.endswith(f"\n{told}\n")
    assert "every trial diverged" in out
    assert "Without a result, because every trial of its search diverged: l2-pgm." in " ".join(out.split())
    assert "every trial diverged" in (comparison.output / "report.html").read_text()
    assert tethertune("compare", path)[2] == f"{told}\n"  # nothing is made again


@pytest.mark.parametrize("executor", ["local", "processes"])
def test_after_an_error_no_more_runs_begin(made, executor, monkeypatch):
    began = []
    comparison, _ = made('methods = ["none"]\nseeds = 9\nretrain_on = "train"\n', executor=executor)

    class Pool:
        def __init__(self, pool):
            self.pool = pool

        def submit(self, call):
            began.append(call)
            return self.pool.submit(divmod, 1, 0)

        def shutdown(self, **options):
            self.pool.shutdown(**options)

    real = compare.EXECUTORS[executor]
    monkeypatch.setitem(compare.EXECUTORS, executor, lambda workers: Pool(real(workers)))
    with pytest.raises(ZeroDivisionError):
        compare.run(comparison, quiet=True)
    assert len(began) <= comparison.workers


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_and_started_again_it_finds_the_same(made):
    """Killed with SIGKILL, workers and all, six times at moments that no one chose."""
    comparison, path = made(SEARCHED.replace("seeds = 2", "seeds = 3"))
    began = time.monotonic()
    compare.run(comparison, quiet=True)
    longest = (time.monotonic() - began) / 3
    expected = tables(comparison.output)
    again = comparison.output.with_name("again")
    command = [sys.executable, "-m", "tethertune", "compare", path, "--output", again, "--executor", "processes"]
    moments, ends = random.Random(0), []
    for _ in range(6):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wait_for_a_file_below(again, process)
            time.sleep(moments.uniform(0, longest))
            process.kill()
        ends.append(process.returncode)
    assert ends[0] == -signal.SIGKILL, "it ended before it could be killed"
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert tables(again) == expected
    assert (again / "report.html").exists()
    studies = {json.dumps(run.info["part"]) for run in runs.find([again / "trials"])}
    assert len(studies) == len(runs.find([again / "trials"])) == 6


def wait_for_a_file_below(folder, process):
    count = len(list(folder.rglob("*")))
    while process.poll() is None and len(list(folder.rglob("*"))) <= count:
        time.sleep(0.05)
