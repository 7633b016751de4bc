from dataclasses import replace
from pathlib import Path

import pytest

from tethertune.errors import ConfigurationError
from tethertune.lab.comparison import Cell, Comparison, Scope, Sweep
from tethertune.lab.space import SearchConfig

GIVEN = {
    "none": [{}],
    "l2-sp": [{"strength": 0.5, "head_strength": 0.25, "lr": 0.3}, {"strength": 2.0}],
    "mars-pgm": [{"relative_radius": 0.5}, {"radius": 2.0, "head_radius": 3.0}],
}


@pytest.fixture
def made(tiny):
    """Two networks, two tasks and every method of :data:`GIVEN`, from which ``replace`` makes others."""
    cells = tuple(
        Cell(model, task, tiny(method=method, lr=0.1, seed=9), ())
        for task in ("birds", "pets")
        for model in ("small", "large")
        for method in GIVEN
    )
    return Comparison(
        cells=cells,
        search=None,
        seeds=(1, 2, 3),
        retrain_on="train+validation",
        sweeps=(),
        interpolate=None,
        executor="local",
        workers=1,
        output=Path("out"),
        storage=None,
    )


def each_way(comparison):
    return [(cell, values) for cell in comparison.cells for values in GIVEN[cell.method]]


def test_a_cell_is_named_by_network_task_and_method(tiny):
    assert Cell("resnet101", "pets", tiny(method="l2-sp"), ()).name == "resnet101 pets l2-sp"


def test_cells_of_one_place_differ_in_their_method_alone(made):
    places = {cell.place for cell in made.cells}
    assert len(places) == 4
    for place in places:
        assert [cell.method for cell in made.cells if cell.place == place] == list(GIVEN)


def test_the_runs_that_count_have_the_values_and_nothing_else_of_the_method(made):
    for cell, values in each_way(made):
        runs = made.final(cell, values)
        assert [run.seed for run in runs] == [1, 2, 3]
        for run in runs:
            wanted = {key: value for key, value in values.items() if key != "lr"} or cell.base.hyper_parameters
            assert run.hyper_parameters == wanted
            assert run.lr == values.get("lr", 0.1)
            assert (run.train_on, run.output) == ("train+validation", str(Path("out/runs")))
            assert (
                replace(run, seed=9, **{key: getattr(cell.base, key) for key in changed(run, cell.base)}) == cell.base
            )


def changed(run, base):
    return {"lr", "train_on", "output", *run.hyper_parameters, *base.hyper_parameters}


def test_a_curve_multiplies_what_a_method_has_and_leaves_the_rest(made):
    scope = Scope(tasks=("pets",), seeds=(4, 5))
    swept = replace(made, sweeps=(Sweep("strengths", (0.1, 10.0), scope), Sweep("lr", (0.7,), scope)))
    for cell, values in each_way(swept):
        runs = swept.swept(cell, values)
        if cell.task != "pets":
            assert not runs
            continue
        curve = [(run, part["value"]) for run, part in runs if part["key"] == "strengths"]
        assert len(curve) == (0 if cell.method == "none" else 4)
        (chosen, *_) = swept.final(cell, values)
        for run, factor in curve:
            assert run.hyper_parameters == {key: factor * value for key, value in chosen.hyper_parameters.items()}
            assert run.lr == chosen.lr
        rates = [(run.lr, run.seed, run.hyper_parameters) for run, part in runs if part["key"] == "lr"]
        assert rates == [(0.7, seed, chosen.hyper_parameters) for seed in (4, 5)]
        assert {part["kind"] for _, part in runs} == {"sweep"}
        assert {(run.output, run.train_on) for run, _ in runs} == {(str(Path("out/sweeps")), "train+validation")}


@pytest.mark.parametrize("tune_lr", [False, True])
def test_only_what_is_neither_given_nor_without_a_range_is_searched(made, tune_lr):
    assert {made.trials(cell) for cell in made.cells} == {0}
    searched = replace(made, search=SearchConfig(trials=7, tune_lr=tune_lr))
    for cell in searched.cells:
        assert searched.trials(cell) == (0 if cell.method == "none" and not tune_lr else 7)
        assert searched.trials(replace(cell, given=({"lr": 0.1},))) == 0


def test_some_tasks_alone_are_the_same_cells(made):
    assert made.only([]) == made
    assert made.only(["pets"]) == replace(made, cells=tuple(cell for cell in made.cells if cell.task == "pets"))
    assert made.only(["pets", "birds"]) == made
    with pytest.raises(
        ConfigurationError, match=r"--task bird is not a task .* use birds, pets\. Did you mean 'birds'"
    ):
        made.only(["bird"])


def test_a_scope_without_tasks_is_all_of_them():
    assert Scope().holds("pets")
    assert [Scope(tasks=("pets",)).holds(task) for task in ("pets", "birds")] == [True, False]
