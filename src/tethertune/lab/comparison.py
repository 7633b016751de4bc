"""What a comparison is made of: networks x tasks x methods, and what is measured around them.

A cell is one network, one task and one method: its values are given, searched for, or the method's defaults; then it
is trained once a seed. How a file says it is told in :mod:`tethertune.lab.comparison_file`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tethertune.errors import ConfigurationError, did_you_mean
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.space import SearchConfig, tuned_keys

__all__ = ["Cell", "Comparison", "Interpolate", "Scope", "Sweep"]


@dataclass(frozen=True)
class Scope:
    """Which of the runs something is done for.

    Attributes:
        tasks: Names of the tasks; empty for all.
        seeds: The seeds.
    """

    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def holds(self, task: str) -> bool:
        """Whether a task is meant."""
        return not self.tasks or task in self.tasks


@dataclass(frozen=True)
class Sweep:
    """One curve: the runs of a cell again, with something changed.

    Attributes:
        key: ``"lr"``, or ``"strengths"`` for both hyper-parameters of the method times a factor.
        values: The learning rates or the factors.
        scope: For which runs.
    """

    key: Literal["lr", "strengths"]
    values: tuple[float, ...]
    scope: Scope

    def change(self, config: FinetuneConfig, value: float) -> dict[str, float]:
        """What is changed of a run for one point of the curve; nothing where the method has no such thing."""
        if self.key == "lr":
            return {"lr": value}
        return {key: value * tuned for key, tuned in config.hyper_parameters.items()}


@dataclass(frozen=True)
class Interpolate:
    """Measure runs on the way back to their reference.

    Attributes:
        alphas: The places.
        retain: The folder of images whose answers are to stay; ``None``: that of the run, if any.
        retain_size: Side of those images in pixels.
        scope: For which runs.
    """

    alphas: tuple[float, ...]
    retain: str | None
    retain_size: int | None
    scope: Scope


@dataclass(frozen=True)
class Cell:
    """One network, one task, one method.

    Attributes:
        model: Label of the network.
        task: Name of the task.
        base: The configuration of its trials, without the values that are searched for.
        given: Options that are given for this cell, one dictionary for each way to do it; empty where they are searched
            for, or the method's defaults.
    """

    model: str
    task: str
    base: FinetuneConfig
    given: tuple[Mapping[str, Any], ...]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.base.method

    @property
    def place(self) -> tuple[str, str]:
        """Network and task: what runs that take the same time have in common."""
        return self.model, self.task

    @property
    def name(self) -> str:
        """What to call it in a line."""
        return f"{self.model} {self.task} {self.method}"


@dataclass(frozen=True)
class Comparison:
    """A whole comparison, checked.

    Attributes:
        cells: In the order in which they are made: task by task, network by network.
        search: How values are searched for; ``None`` where none are.
        seeds: Of the runs that count.
        retrain_on: What those are trained on.
        sweeps: Curves around the chosen values.
        interpolate: What is measured on the way back to the reference; ``None``: nothing.
        executor: A name of :data:`~tethertune.lab.executors.EXECUTORS`.
        workers: Processes of the executor.
        output: The folder of everything.
        storage: URL of the studies' database; ``None`` for a file in the folder.
    """

    cells: tuple[Cell, ...]
    search: SearchConfig | None
    seeds: tuple[int, ...]
    retrain_on: Literal["train", "train+validation"]
    sweeps: tuple[Sweep, ...]
    interpolate: Interpolate | None
    executor: str
    workers: int
    output: Path
    storage: str | None

    def only(self, tasks: Collection[str]) -> "Comparison":
        """The same for some of the tasks alone; for all of them if none is named.

        Raises:
            ConfigurationError: A task that there is not.
        """
        known = list(dict.fromkeys(cell.task for cell in self.cells))
        for task in tasks:
            if task not in known:
                raise ConfigurationError(
                    f"--task {task} is not a task of this comparison: use {', '.join(known)}."
                    f"{did_you_mean(task, known)}"
                )
        return replace(self, cells=tuple(cell for cell in self.cells if not tasks or cell.task in tasks))

    def trials(self, cell: Cell) -> int:
        """How many trials the search of a cell takes; 0 where nothing is searched."""
        if self.search is None or cell.given or not tuned_keys(cell.method, tune_lr=self.search.tune_lr):
            return 0
        return self.search.trials

    def final(self, cell: Cell, values: Mapping[str, Any]) -> list[FinetuneConfig]:
        """The runs of a cell that count, once its values are known."""
        chosen = cell.base.having(**values, train_on=self.retrain_on, output=str(self.output / "runs"))
        return [replace(chosen, seed=seed) for seed in self.seeds]

    def swept(self, cell: Cell, values: Mapping[str, Any]) -> list[tuple[FinetuneConfig, dict[str, Any]]]:
        """The runs of a cell's curves, each with what ``run.json`` says it is a part of."""
        chosen = cell.base.having(**values, train_on=self.retrain_on, output=str(self.output / "sweeps"))
        return [
            (replace(chosen.having(**changed), seed=seed), {"kind": "sweep", "key": sweep.key, "value": value})
            for sweep in self.sweeps
            if sweep.scope.holds(cell.task)
            for value in sweep.values
            if (changed := sweep.change(chosen, value))
            for seed in sweep.scope.seeds
        ]
