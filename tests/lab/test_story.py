import re
import shlex
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from tethertune.lab import story, studies
from tethertune.lab.display import Display
from tethertune.lab.search import Best
from tethertune.lab.space import Dimension, SearchConfig
from tethertune.lab.story import Story
from tethertune.lab.studies import SharedStudy

BEGAN = datetime(2024, 5, 1, 12)  # noqa: DTZ001 - Optuna keeps local times without a zone


@pytest.fixture
def tell(tmp_path):
    """``tell(*trials, ended=0)`` is what is said when the trial of that number has ended, and what is returned."""

    def call(*trials, ended=0, limit=6, workers=1, objective="accuracy"):
        storage = studies.connect(f"sqlite:///{tmp_path}/search.db")
        study = studies.open_study(storage, "s", {}, direction="maximize" if objective == "accuracy" else "minimize")
        for trial in trials:
            study.add_trial(trial)
        shared = SharedStudy(study, limit, tmp_path / "here")
        with Display("search", limit) as display:
            told = Story(shared, SearchConfig(objective=objective), epochs=1, workers=workers, display=display)
            return told.ended(ended, {"lr": 0.001})

    return call


def trial(value=None, *, seconds=30.0, state=TrialState.COMPLETE, **attributes):
    return FrozenTrial(
        number=0,
        state=state,
        value=value,
        datetime_start=BEGAN,
        datetime_complete=BEGAN + timedelta(seconds=seconds),
        params={},
        distributions={},
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={},
        trial_id=0,
    )


def test_a_line_says_what_came_out_what_is_best_and_what_is_left(tell, capsys):
    returned = tell(trial(0.5), trial(0.75), trial(0.625), ended=2)
    assert returned == "trial 2, --lr 0.001, validation accuracy 62.50%"
    assert capsys.readouterr().err == f"[3/6] {returned}, best 75.00% (trial 1), about 90 s left\n"


def test_where_the_only_trial_so_far_was_ended_by_hand_no_time_is_told(tell, capsys):
    returned = tell(trial(state=TrialState.FAIL))
    assert returned.startswith("trial 0, --lr 0.001")
    assert "left" not in capsys.readouterr().err


def test_of_losses_the_lowest_is_best_and_at_the_end_nothing_is_left(tell, capsys):
    returned = tell(trial(0.5), trial(0.25), ended=1, limit=2, objective="loss")
    assert returned == "trial 1, --lr 0.001, validation loss 0.2500"
    assert capsys.readouterr().err == f"[2/2] {returned}, best 0.2500 (trial 1)\n"


def test_trials_without_a_value_are_told_and_are_not_the_best(tell, capsys):
    lost = trial(0.0, diverged="the loss is not finite")
    assert tell(lost, ended=0) == "trial 0, --lr 0.001, diverged"
    stopped = trial(state=TrialState.PRUNED)
    assert tell(stopped, ended=1) == "trial 1, --lr 0.001, stopped early"
    assert "best" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "workers", "left"),
    [
        ((10, 10, 1000), 1, "30 s"),  # the median is of a trial as most are
        ((60, 60, 60), 1, "3 min"),
        ((60, 60, 60), 2, "90 s"),
        ((3600, 3600, 3600), 1, "3.0 h"),
        ((3600, 3600, 3600), 2, "90 min"),
    ],
)
def test_the_time_left_is_that_of_a_typical_trial_shared_by_the_workers(tell, capsys, seconds, workers, left):
    tell(*(trial(0.5, seconds=each) for each in seconds), workers=workers)
    assert capsys.readouterr().err.endswith(f"about {left} left\n")


def test_a_trial_of_another_machine_is_named_once_with_a_command_that_a_shell_reads(tmp_path, capsys):
    storage = studies.connect(f"sqlite:///{tmp_path}/search.db")
    study = studies.open_study(storage, "it's mine", {}, direction="maximize")
    SharedStudy(study, 2, tmp_path / "elsewhere")._add()
    with Display("search", 1) as display:
        told = Story(SharedStudy(study, 2, tmp_path / "here"), SearchConfig(), epochs=1, workers=1, display=display)
        told.waiting()
        told.waiting()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"Waiting for trial 0, which {study.trials[0].user_attrs['host']} makes in {tmp_path / 'elsewhere'}." in line
    words = shlex.split(line[line.index("optuna tell") :])
    assert words[words.index("--study-name") + 1] == "it's mine"
    assert words[words.index("--trial-number") + 1] == "0"


def test_on_a_terminal_the_bar_goes_on_from_the_trials_that_have_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("tethertune.lab.display._INTERVAL", 0)
    storage = studies.connect(f"sqlite:///{tmp_path}/search.db")
    study = SharedStudy(studies.open_study(storage, "s", {}, direction="maximize"), 3, tmp_path)
    study.study.add_trial(trial(0.5))
    with Display("search", 3 * 4) as display:
        Story(study, SearchConfig(), epochs=4, workers=1, display=display).epoch(1)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"5/12 +trial 2 of 3", shown)


@given(st.dictionaries(st.sampled_from(["lr", "radius", "head_strength"]), st.floats(1e-8, 1e8)))
def test_flags_give_back_what_is_used(values):
    used = studies.short(values)
    words = story.flags(used).split()
    read = {
        word.removeprefix("--").replace("-", "_"): float(value)
        for word, value in zip(words[::2], words[1::2], strict=True)
    }
    assert read == used


def test_the_result_names_edges_and_warns_only_where_something_was_chosen(tiny):
    space = (Dimension("radius", 1.0, 100.0), Dimension("head_radius", 1.0, 100.0))
    config = tiny(radius=10.0, head_radius=99.0)

    def told(finished):
        values = {"radius": 10.0, "head_radius": 99.0}
        best = Best(values, 0.75, 3, finished, 2, 0, "s", "sqlite:///s.db", "accuracy", space, config)
        return story.result(best).splitlines()

    first, best, body, head, flatters, *_, command = told(5)
    assert first == "Study s in sqlite:///s.db: trials 5 finished, 2 stopped early"
    assert best == "Best validation accuracy: 75.00%, of trial 3"
    assert body == "  radius 10 (searched from 1 to 100)"
    assert head.startswith("  head radius 99 (searched from 1 to 100: at the upper end")
    assert "flatters" in flatters
    assert command == config.command()
    assert not any("flatters" in line for line in told(1))
