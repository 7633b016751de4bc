import sys

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from tethertune.errors import ConfigurationError, MissingExtraError
from tethertune.lab import studies
from tethertune.lab.runs import locked
from tethertune.lab.studies import SharedStudy, SteadySampler


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/search.db"


@pytest.fixture
def shared(url, tmp_path):
    """``shared(limit, folder)``: the same study, as one of its processes sees it."""

    def view(limit=2, folder="here", direction="maximize"):
        study = studies.open_study(studies.connect(url), "s", {}, direction=direction)
        return SharedStudy(study, limit, tmp_path / folder)

    return view


def test_a_trial_is_held_by_one_and_taken_over_when_it_is_let_go(shared):
    one, other = shared(), shared()
    with one.claim() as first, other.claim() as second:
        assert (first.number, second.number) == (0, 1)
        with shared().claim() as third:
            assert third is None
        other.tell(second, 0.5, TrialState.COMPLETE)
    with other.claim() as again:
        assert again.number == 0
        other.tell(again, 0.4, TrialState.COMPLETE)
    assert [trial.value for trial in one.finished()] == [0.4, 0.5]
    assert one.best().number == 1


def test_one_too_many_fails_and_a_larger_search_does_without_it(shared):
    shared(limit=1)._add()
    shared(limit=1)._add()
    states = [trial.state for trial in shared().study.trials]
    assert states == [TrialState.RUNNING, TrialState.FAIL]
    larger = shared(limit=2)
    with larger.claim() as first, shared(limit=2).claim() as second:
        assert (first.number, second.number) == (0, 2)


def test_one_too_many_that_another_search_has_taken_is_left_to_it(shared, tmp_path):
    shared(limit=1)._add()
    with locked(tmp_path / "here" / "1"):
        shared(limit=1)._add()
    assert [trial.state for trial in shared().study.trials] == [TrialState.RUNNING] * 2


def test_what_another_folder_holds_is_left_alone(shared, tmp_path):
    shared(folder="there")._add()
    here = shared(limit=1)
    with here.claim() as trial:
        assert trial is None
    assert [trial.number for trial in here.elsewhere()] == [0]
    with shared(limit=1, folder="there").claim() as trial:
        assert trial.number == 0
    (tmp_path / "there").rename(tmp_path / "moved")
    with shared(limit=1, folder="moved").claim() as trial:
        assert trial.number == 0


def test_a_trial_that_was_ended_by_hand_stays_as_it_is(shared):
    study = shared(limit=1)
    with study.claim() as trial:
        study.study.tell(trial.number, 1.0)
        study.tell(trial, 0.5, TrialState.COMPLETE)
    assert study.best().value == 1.0


@pytest.mark.parametrize(("direction", "number"), [("maximize", 1), ("minimize", 3)])
def test_the_best_is_the_first_with_the_best_value_among_those_with_a_result(shared, direction, number):
    view = shared(limit=9, direction=direction)
    assert view.best() is None
    for value in (0.4, 0.5, 0.5, 0.0, 0.0):
        view.study.add_trial(create_trial(value=value))
    for value in (9.0, -9.0):
        view.study.add_trial(create_trial(value=value, user_attrs={studies.DIVERGED: "the loss is not finite"}))
    view.study.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values={1: 9.0}))
    view.study.add_trial(create_trial(state=TrialState.RUNNING))
    assert view.best().number == number
    assert [trial.number for trial in view.finished()] == list(range(8))


def test_other_settings_are_refused(shared, url):
    shared()
    storage = studies.connect(url)
    with pytest.raises(ConfigurationError, match=r"^--study s was begun with other settings \(epochs -, now 3\)"):
        studies.open_study(storage, "s", {"epochs": 3}, direction="maximize")


def test_settings_are_the_same_after_a_database_has_made_lists_of_their_tuples(url):
    for _ in range(2):
        study = studies.open_study(studies.connect(url), "s", {"range": (1.0, 2.0)}, direction="minimize")
    assert study.user_attrs["settings"] == {"range": [1.0, 2.0]}


def test_finished_trials_are_counted_and_no_database_is_made_to_count_them(shared, url, tmp_path):
    assert studies.finished_trials(url, "s") == 0
    assert not (tmp_path / "search.db").exists()
    study = shared().study
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING):
        study.add_trial(create_trial(state=state, value=1.0 if state == TrialState.COMPLETE else None))
    assert studies.finished_trials(url, "s") == 2
    assert studies.finished_trials(url, "other") == 0


@given(st.floats(1e-30, 1e30))
def test_what_is_printed_of_a_value_is_what_is_used(value):
    found = studies.short({"lr": value})["lr"]
    assert float(f"{found:g}") == found
    assert found == pytest.approx(value, rel=5.01e-4)


@pytest.fixture
def make_study():
    """``make_study()``: always the same six finished trials."""

    def make():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(1), direction="maximize")
        study.optimize(lambda trial: -((trial.suggest_float("x", 1, 9, log=True) - 3) ** 2), 6)
        return study

    return make


@pytest.mark.parametrize("name", ["tpe", "random", "gp"])
def test_a_proposal_is_a_function_of_seed_number_and_trials(make_study, name):
    def propose(study, seed, startup=3):
        study.sampler = SteadySampler(name, startup=startup, seed=seed)
        return study.ask().suggest_float("x", 1, 9, log=True)

    first, used = make_study(), make_study()
    assert propose(first, 0) == propose(make_study(), 0) != propose(make_study(), 1)
    propose(used, 0)
    assert propose(used, 0) == propose(first, 0)  # the next one, for both
    assert (propose(make_study(), 0) == propose(make_study(), 0, startup=7)) == (name == "random")


def test_values_by_themselves_do_not_depend_on_their_order(make_study):
    study, sampler = make_study(), SteadySampler("random", startup=1, seed=0)
    trial, range_ = study.trials[0], FloatDistribution(1, 9)
    first = [sampler.sample_independent(study, trial, name, range_) for name in "ab"]
    second = [sampler.sample_independent(study, trial, name, range_) for name in "ba"]
    assert first == second[::-1]
    assert first[0] != first[1]


def test_what_was_proposed_before_is_not_proposed_again(make_study, monkeypatch):
    study = make_study()
    before = study.trials[2].params["x"]
    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", lambda *_: {"x": before * (1 + 1e-6)})
    study.sampler = SteadySampler("tpe", startup=3, seed=0)
    assert study.ask().suggest_float("x", 1, 9, log=True) != pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("search.db", r"--storage search.db is no database URL: use sqlite:///FILE or postgresql"),
        ("nosql://x", "--storage nosql://x is no database URL"),
        ("sqlite:////nowhere/s.db", "--storage sqlite:////nowhere/s.db cannot be used: unable to open database"),
    ],
)
def test_a_storage_that_cannot_be_used(url, told):
    with pytest.raises(ConfigurationError, match=told) as raised:
        studies.connect(url)
    assert "\n" not in str(raised.value)


def test_a_storage_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"--storage postgresql\+psycopg://me:\*\*\*@here/x needs a package"):
        studies.connect("postgresql+psycopg://me:secret@here/x")
