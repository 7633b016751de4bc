"""Searches of real, tiny runs; killed anywhere, and shared by several processes."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import optuna
import pytest
from optuna.trial import TrialState

from tethertune.errors import ConfigurationError, NonFiniteWeightError
from tethertune.lab import runs, search, studies
from tethertune.lab.runs import RunFolder
from tethertune.lab.search import SearchConfig
from tethertune.lab.studies import SharedStudy

DRIVER = '''
"""Search in forked processes (so that the imports are paid once), some of which are killed: kill.py JSON."""
import json
import os
import random
import signal
import sys
import time

import torch
from optuna.storages import _CachedStorage

from tethertune.lab import search
from tethertune.lab.config import load_toml

torch.set_num_threads(1)
order = json.loads(sys.argv[1])
config, settings = load_toml(order["file"]), search.SearchConfig(**order["settings"])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner, name, count, *, before):
    """Die right before or right after so many calls."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0 and before:
            die()
        result = original(*args, **kwargs)
        if count == 0:
            die()
        return result

    setattr(owner, name, call)


def start(place=None):
    child = os.fork()
    if child == 0:
        try:
            if place is not None:
                owner, name, count, before = place
                die_at({"storage": _CachedStorage, "os": os}[owner], name, count, before=before)
            search.run(config, settings, study="s", quiet=True)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def was_killed(child):
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


for place in order.get("places", []):
    assert was_killed(start(place)), f"{place} was not reached"
chance, kills = random.Random(0), order.get("kills", 0)
workers = [start() for _ in range(order["workers"])]
while kills:
    time.sleep(chance.uniform(0.2, 1.2))
    victim = workers.pop(chance.randrange(len(workers)))
    os.kill(victim, signal.SIGKILL)
    kills -= was_killed(victim)
    workers.append(start())
for worker in workers:
    assert not was_killed(worker)
'''


@pytest.fixture
def drive(tmp_path):
    """``drive(config, settings, workers=1)`` searches in processes of its own, as :data:`DRIVER` says."""

    def call(config, settings, **order):
        (tmp_path / "kill.py").write_text(DRIVER)
        (tmp_path / "run.toml").write_text(config.to_toml())
        order |= {"file": str(tmp_path / "run.toml"), "settings": asdict(settings)}
        command = [sys.executable, tmp_path / "kill.py", json.dumps({"workers": 1} | order)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr

    return call


@pytest.fixture
def free(tiny):
    """``free(epochs=1)`` is a tiny run whose hyper-parameters are left to a search."""

    def configure(**values):
        return load_toml_like(tiny(**{"epochs": 1} | values))

    def load_toml_like(config):
        return replace(config, radius=None, relative_radius=None, head_radius=None)

    return configure


def connected(output):
    return optuna.load_study(storage=studies.connect(search.storage_url(output)), study_name="s")


def trials(output):
    return [trial for trial in connected(output).trials if trial.state != TrialState.FAIL]


def story(output):
    """All that a study says of its trials, but for times, places and tokens."""
    return [
        (trial.number, trial.state, trial.values, trial.params, trial.intermediate_values, studies.diverged(trial))
        for trial in connected(output).trials
    ]


def points(output):
    return {tuple(trial.params.values()) for trial in trials(output)}


def find(config, *, output=None, study="s", **settings):
    return search.run(config, SearchConfig(**settings), output=output, study=study, quiet=True)


class TestSearch:
    @pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
    def test_finds_the_best_of_distinct_points(self, free, tmp_path, sampler):
        config = free(lr=1e-3)
        best = find(config, trials=5, startup=2, sampler=sampler, output=tmp_path)
        made = trials(tmp_path)
        assert [trial.state for trial in made] == [TrialState.COMPLETE] * 5
        assert len(points(tmp_path)) == 5
        assert all(math.exp(0.5) <= value <= math.exp(3.5) for point in points(tmp_path) for value in point)
        assert best.value == max(trial.value for trial in made)
        assert best.trial == next(trial.number for trial in made if trial.value == best.value)
        assert best.values == studies.short(made[best.trial].params)
        assert (best.finished, best.pruned, best.diverged) == (5, 0, 0)
        assert best.config == replace(config, **{"relative_radius": None} | best.values)

    def test_a_trial_is_a_run_that_is_not_tested_and_leaves_no_weights(self, free, tmp_path):
        best = find(free(), trials=2, output=tmp_path)
        made = runs.find([tmp_path / "trials"])
        assert sorted(run.info["part"]["number"] for run in made) == [0, 1]
        for run in made:
            assert run.info["part"]["study"] == "s"
            assert run.info["outcome"]["test_accuracy"] is None
            assert not (run.path / "model.safetensors").exists()
            (trial,) = (t for t in trials(tmp_path) if t.number == run.info["part"]["number"])
            assert run.info["outcome"]["validation_accuracy"] == trial.value
            assert studies.short(trial.params).items() <= run.info["config"].items()
        json.dumps(best.to_dict(), allow_nan=False)

    def test_lowest_loss(self, free, tmp_path):
        best = find(free(method="l2-sp"), trials=3, objective="loss", output=tmp_path)
        assert best.value == min(trial.value for trial in trials(tmp_path))
        assert set(best.values) == {"strength", "head_strength"}

    def test_plain_fine_tuning_has_nothing_to_search_but_the_learning_rate(self, free, tmp_path):
        plain = find(free(method="none"), trials=5, output=tmp_path)
        assert (plain.values, plain.finished, plain.space) == ({}, 1, ())
        tuned = find(free(method="none"), trials=3, tune_lr=True, output=tmp_path, study="lr")
        assert (set(tuned.values), tuned.finished) == ({"lr"}, 3)

    def test_more_trials_go_on_where_it_ended_and_fewer_look_at_the_first(self, free, tmp_path):
        find(free(), trials=2, startup=1, output=tmp_path / "a")
        find(free(), trials=4, startup=1, output=tmp_path / "a")
        find(free(), trials=4, startup=1, output=tmp_path / "b")
        assert story(tmp_path / "a") == story(tmp_path / "b")
        assert find(free(), trials=1, startup=1, output=tmp_path / "a").finished == 1

    def test_two_studies_share_the_run_of_a_point(self, free, tmp_path):
        find(free(), trials=2, output=tmp_path)
        find(free(), trials=2, output=tmp_path, study="again", sampler="random")
        assert len(runs.find([tmp_path / "trials"])) == 2

    def test_ranges_from_an_epoch_are_found_once(self, free, tmp_path):
        best = find(free(), trials=1, space="auto", output=tmp_path)
        (probe,) = (run for run in runs.find([tmp_path / "trials"]) if run.info["part"]["number"] is None)
        layers = probe.distances["layers"].values()
        radius, head = best.space
        assert radius.high == pytest.approx(max(la["mars"] for la in layers if la["role"] == "body"), rel=0.05)
        assert head.high == pytest.approx(10 * next(la["mars"] for la in layers if la["role"] == "head"), rel=0.05)
        (probe.path / "run.json").unlink()
        again = find(free(), trials=2, space="auto", output=tmp_path)
        assert again.space == best.space
        assert not (probe.path / "run.json").exists()

    def test_a_trial_that_diverges_counts_with_the_worst_value(self, free, tmp_path):
        config = free(method="none", optimizer="sgd")
        for objective, worst in (("accuracy", 0.0), ("loss", math.inf)):
            settings = {"objective": objective, "tune_lr": True, "lr_range": (1e-4, 1e36), "sampler": "gp"}
            best = find(config, trials=5, startup=3, output=tmp_path / objective, **settings)
            lost = [trial for trial in trials(tmp_path / objective) if studies.diverged(trial)]
            assert 0 < len(lost) == best.diverged < 5
            assert {(trial.state, trial.value) for trial in lost} == {(TrialState.COMPLETE, worst)}
            assert all("diverged" in trial.user_attrs["diverged"] for trial in lost)

    def test_nothing_but_divergence_is_told(self, free, tmp_path):
        config = free(method="none", optimizer="sgd")
        with pytest.raises(NonFiniteWeightError, match=r"No trial of study s came to a result: 2 of 2 diverged"):
            find(config, trials=2, tune_lr=True, lr_range=(1e35, 1e36), output=tmp_path)

    def test_a_trial_that_is_behind_is_stopped_and_learnt_from(self, free, tmp_path):
        config = free(method="none", epochs=4, checkpoint_every=0)
        settings = {"tune_lr": True, "lr_range": (1e-8, 1e-2), "objective": "loss", "prune": True, "startup": 2}
        best = find(config, trials=6, output=tmp_path, **settings)
        stopped = [trial for trial in trials(tmp_path) if trial.state == TrialState.PRUNED]
        assert 0 < len(stopped) == best.pruned
        assert all(trial.number >= 2 and trial.intermediate_values for trial in stopped)
        for run in runs.find([tmp_path / "trials"]):
            assert not (run.path / "resume").exists()


class TestStory:
    def test_a_line_a_trial_and_what_is_best(self, free, tmp_path, capsys):
        search.run(free(), SearchConfig(trials=2), output=tmp_path)
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("[1/2] trial 0, --radius ")
        assert ", validation accuracy " in first
        assert first.endswith("s left")
        assert last.startswith("[2/2] trial 1")
        assert "left" not in last

    def test_quiet(self, free, tmp_path, capsys):
        find(free(), trials=1, output=tmp_path)
        assert capsys.readouterr() == ("", "")

    def test_a_trial_of_another_machine_is_named(self, free, tmp_path, capsys):
        config = free()
        here = search.Search(
            config, SearchConfig(trials=1), tmp_path, search.storage_url(tmp_path), "s", workers=1, quiet=False
        )
        study, _ = here.open()
        SharedStudy(study.study, 1, tmp_path / "elsewhere")._add()
        assert here.advance() is None
        told = capsys.readouterr().err
        assert "Waiting for trial 0" in told
        assert str(tmp_path / "elsewhere") in told
        assert "optuna tell" in told
        assert search.trials_done(here.storage, "s") == 0


class TestKilled:
    PLACES = (
        ("storage", "create_new_trial", 1, True),
        ("storage", "create_new_trial", 1, False),  # added, and nothing proposed
        ("storage", "set_trial_param", 1, False),  # one of two values proposed
        ("storage", "set_trial_param", 2, False),  # nothing trained
        ("os", "replace", 3, True),  # in the middle of the training
        ("storage", "set_trial_state_values", 1, True),  # trained, and not told
        ("storage", "set_trial_state_values", 1, False),  # told
        ("storage", "create_new_trial", 1, False),
        ("storage", "set_trial_param", 1, True),
        ("storage", "set_trial_param", 3, False),  # a whole trial, and half of the next
        ("os", "replace", 9, False),
        ("storage", "set_trial_system_attr", 1, False),  # what the sampler notes for others
        ("storage", "set_trial_state_values", 1, True),
    )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "settings",
        [
            {"startup": 2},
            {"startup": 2, "prune": True, "objective": "loss", "tune_lr": True, "lr_range": (1e-8, 1e-2)},
            {"startup": 2, "sampler": "gp"},
        ],
    )
    def test_anywhere_and_started_again_it_proposes_the_same(self, free, tmp_path, drive, settings):
        config = free(epochs=3, checkpoint_every=0)
        settings = SearchConfig(trials=8, **settings)
        places = [*self.PLACES]
        if settings.prune:
            places += [("storage", "set_trial_intermediate_value", 1, before) for before in (True, False)]
        whole, killed = (replace(config, output=str(tmp_path / name)) for name in ("whole", "killed"))
        drive(whole, settings)
        drive(killed, settings, places=places)
        assert story(killed.output) == story(whole.output)
        assert len(points(whole.output)) == 8
        assert {trial.state for trial in trials(whole.output)} <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert settings.prune == any(trial.state == TrialState.PRUNED for trial in trials(whole.output))

    @pytest.mark.slow
    @pytest.mark.parametrize(("workers", "kills"), [(2, 0), (3, 4)])
    def test_several_processes_make_each_trial_once(self, free, tmp_path, drive, workers, kills):
        config = free(epochs=2, checkpoint_every=0, output=str(tmp_path))
        drive(config, SearchConfig(trials=20, startup=5), workers=workers, kills=kills)
        assert [trial.state for trial in trials(tmp_path)] == [TrialState.COMPLETE] * 20
        assert len(points(tmp_path)) == 20
        made = runs.find([tmp_path / "trials"])
        assert len(made) == 20
        assert all(run.complete for run in made)
        assert {run.info["part"]["number"] for run in made} == {trial.number for trial in trials(tmp_path)}

    @pytest.mark.slow
    def test_workers_of_one_command(self, free, tmp_path):
        best = search.run(free(), SearchConfig(trials=6), output=tmp_path, study="s", workers=2, quiet=True)
        assert best.finished == 6
        assert len(points(tmp_path)) == 6
        assert best.config.threads == 1

    @pytest.mark.slow
    def test_an_error_of_a_worker_is_told_and_ends_all(self, free, tmp_path):
        config = free(exclude=("nothing.*",))
        with pytest.raises(ConfigurationError, match="nothing"):
            search.run(config, SearchConfig(trials=2), output=tmp_path, study="s", workers=2, quiet=True)
        assert search.trials_done(search.storage_url(tmp_path), "s") == 0


def test_how_many_trials_are_done(free, tmp_path):
    url = search.storage_url(tmp_path)
    assert search.trials_done(url, "s") == 0
    assert not (tmp_path / "search.db").exists()
    find(free(), trials=2, output=tmp_path)
    assert search.trials_done(url, "s") == 2
    assert search.trials_done(url, "other") == 0


class TestRefusals:
    def test_of_validation_images_that_are_trained_on(self, free, tmp_path):
        with pytest.raises(ConfigurationError, match=r"--train-on train\+validation leaves no validation images"):
            find(free(train_on="train+validation"), output=tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_of_no_workers(self, free, tmp_path):
        with pytest.raises(ConfigurationError, match="--workers 0 is not allowed"):
            search.run(free(), SearchConfig(), output=tmp_path, workers=0)

    def test_of_torchrun(self, free, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigurationError, match="without torchrun"):
            find(free(), output=tmp_path)

    def test_of_other_settings(self, free, tmp_path):
        find(free(), trials=1, output=tmp_path)
        with pytest.raises(ConfigurationError, match=r"other settings \(epochs 1, now 2; search seed 0, now 3\)"):
            find(free(epochs=2), trials=1, seed=3, output=tmp_path)


class TestCommand:
    @pytest.fixture
    def command(self, tethertune, free):
        usual = free()
        keys = ("weights", "size", "epochs", "batch_size", "threads", "output", "cache")
        flags = [f"--{key.replace('_', '-')}={getattr(usual, key)}" for key in keys]
        return lambda *words: tethertune("search", usual.model, usual.data, *flags, *words)

    def test_tells_the_best_and_the_command_that_trains_with_it(self, command, tethertune, tmp_path):
        words = ("--trials", 2, "--study", "mine", "--tune-lr", "--lr-range", "1e-4", "1e-2", "--seed", 3)
        code, out, err = command(*words)
        assert code == 0
        assert err.count("\n") == 2
        first, best, *ranges, flatters, _, again = out.splitlines()
        assert first == f"Study mine in sqlite:///{tmp_path}/runs/search.db: trials 2 finished"
        assert best.startswith("Best validation accuracy: ")
        assert [line.split()[0] for line in ranges] == ["radius", "head", "lr"]
        assert "flatters" in flatters

        code, out, err = command(*words, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["command"] == again
        assert (found["finished"], found["study"], set(found["space"])) == (2, "mine", {"radius", "head_radius", "lr"})

        code, out, _ = tethertune(*again.split()[1:])
        assert code == 0
        run = runs.load(out.splitlines()[0])
        assert (run.info["part"], run.info["config"]["seed"]) == (None, 3)
        assert run.info["outcome"]["validation_accuracy"] == found["value"]

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--radius", "3"], "--radius: the search chooses that, so leave it out."),
            (["--tune-lr", "--lr", "1"], "--lr: the search chooses that"),
            (["--trials", "0"], "--trials 0 is not allowed: use a whole number, 1 or more."),
            (["--sampler", "tpes"], "--sampler tpes is not allowed: use tpe, random, gp. Did you mean 'tpe'?"),
            (["--lr-range", "1"], "--lr-range"),
            (["--trails", "3"], "Unknown option: --trails. Did you mean --trials?"),
            (["--workers", "0"], "--workers 0 is not allowed"),
            (["--storage", "here"], "--storage here is no database URL"),
            (["--train-on", "train+validation"], "leaves no validation images to choose by"),
        ],
    )
    def test_bad_input_is_one_line(self, command, words, told):
        code, out, err = command(*words)
        assert (code, out) == (2, "")
        assert told in err
        assert err.count("\n") == 1

    def test_values_in_a_file_that_the_search_chooses(self, tethertune, tmp_path):
        (tmp_path / "my.toml").write_text("model = 'lite0'\ndata = 'fashion'\nhead_radius = 3\n")
        code, _, err = tethertune("search", "--config", tmp_path / "my.toml")
        assert (code, err.split(":")[0]) == (2, "--head-radius")
        code, _, err = tethertune("search", "lite0")
        assert (code, err) == (2, "DATA is missing: tethertune search MODEL DATA, or --config FILE.\n")


def test_a_study_without_a_name_is_told_by_what_it_searches(free):
    config, settings = free(), SearchConfig()
    name = search.study_name(config, settings)
    assert name.startswith("colours-test_efficientnet-mars-pgm-")
    assert name == search.study_name(replace(config, relative_radius=None, radius=3.0), SearchConfig(trials=3))
    assert name == search.study_name(replace(config, output="other", threads=2), settings)
    assert name != search.study_name(replace(config, lr=1e-3), settings)
    assert search.study_name(config, SearchConfig(tune_lr=True)) == search.study_name(
        replace(config, lr=1e-3), SearchConfig(tune_lr=True)
    )
    assert RunFolder(config).path.parts[-3] == "test_efficientnet"
