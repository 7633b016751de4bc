"""``tethertune search``: choose a method's hyper-parameters, and the learning rate, by runs that are not tested.

A trial of the search is an ordinary run below ``OUTPUT/trials``, which resumes when it was killed. How several
processes share them is told in :mod:`tethertune.lab.studies`. With one process the search is a pure function of its
settings: killed at any moment and started again, it proposes what it would have proposed.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.trial import Trial, TrialState

from tethertune.errors import ConfigurationError, NonFiniteWeightError, RunInUseError
from tethertune.lab import runs, space, studies
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.display import Display
from tethertune.lab.executors import processes
from tethertune.lab.methods import METHODS
from tethertune.lab.runs import Run, RunFolder
from tethertune.lab.space import Movement, SearchConfig, Space
from tethertune.lab.story import Story
from tethertune.lab.training import finetune

__all__ = ["Best", "Search", "SearchConfig", "run", "storage_url", "study_name", "trials_done"]

_POLL_SECONDS = 0.5
"""Between two looks at what other processes hold."""


@dataclass(frozen=True)
class Best:
    """What a search found.

    Attributes:
        values: The best value of each configuration key that was searched; empty if none was.
        value: The objective there.
        trial: The number of that trial.
        finished: The trials that have ended.
        pruned: Those of them that were stopped early.
        diverged: Those of them whose training diverged.
        study: The name of the study.
        storage: Its storage, without a password.
        objective: ``"accuracy"`` or ``"loss"``, on the validation images.
        space: What was searched.
        config: The configuration of a run with the best values.
    """

    values: dict[str, float]
    value: float
    trial: int
    finished: int
    pruned: int
    diverged: int
    study: str
    storage: str
    objective: Literal["accuracy", "loss"]
    space: Space
    config: FinetuneConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, and the command that trains with the best values."""
        plain = {key: value for key, value in vars(self).items() if key not in ("space", "config")}
        ranges = {dimension.key: [dimension.low, dimension.high] for dimension in self.space}
        return plain | {"space": ranges, "command": self.config.command()}


def run(
    config: FinetuneConfig,
    settings: SearchConfig,
    *,
    output: str | Path | None = None,
    storage: str | None = None,
    study: str | None = None,
    workers: int = 1,
    quiet: bool = False,
) -> Best:
    """Search, or go on with a search that was begun, until all its trials have ended.

    Args:
        config: The run that is repeated with other values. Its values of what is searched count for nothing.
        settings: What is searched, and how.
        output: The folder of ``trials/`` and of ``search.db``; ``None``: ``config.output``.
        storage: URL of a database; ``None``: ``search.db``.
        study: Name of the study; ``None``: one that tells data, model, method and a hash of the settings.
        workers: Processes that make trials. If there are several, and the configuration says nothing of threads, they
            share the cores.
        quiet: Show no progress.

    Returns:
        The best of the first ``settings.trials`` trials.

    Raises:
        ConfigurationError: The study was begun with other settings, the storage cannot be used, or validation images
            would be trained on.
        NonFiniteWeightError: All trials diverged.
        TethertuneError: What :func:`~tethertune.lab.training.finetune` raises; the search goes on from there when it
            is started again.
    """
    _require_held_out(config, workers)
    output = Path(config.output if output is None else output)
    output.mkdir(parents=True, exist_ok=True)
    name = study_name(config, settings) if study is None else study
    search = Search(config, settings, output, storage_url(output, storage), name, workers, quiet=quiet)
    search.open()  # what is wrong is told once, and the ranges are there, before there are several processes
    if workers == 1:
        search.work()
    else:
        _in_processes(search.work, workers)
    return search.best()


def storage_url(output: str | Path, storage: str | None = None) -> str:
    """The given URL, or that of the file which holds all studies of an output folder."""
    return storage or f"sqlite:///{Path(output) / 'search.db'}"


def study_name(config: FinetuneConfig, settings: SearchConfig) -> str:
    """The name of a study that was given none, e.g. ``fashion-lite0-mars-pgm-1a2b3c4d``."""
    canonical = json.dumps(_identity(config, settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    data, model, method = RunFolder(config).path.parent.parts[-3:]
    return f"{data}-{model}-{method}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def trials_done(storage: str, study: str) -> int:
    """How many trials of a study have ended; 0 where there is no such study."""
    return studies.finished_trials(storage, study)


def _require_held_out(config: FinetuneConfig, workers: int) -> None:
    if config.train_on != "train":
        raise ConfigurationError(
            f"--train-on {config.train_on} leaves no validation images to choose by: search with --train-on train, and"
            " train on both with what it finds."
        )
    if workers < 1:
        raise ConfigurationError(f"--workers {workers} is not allowed: use a whole number, 1 or more.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("A search runs its trials one a process: start it without torchrun, with --workers N.")


def _identity(config: FinetuneConfig, settings: SearchConfig) -> dict[str, Any]:
    """What all processes that work on a study must agree on."""
    searched = space.tuned_keys(config.method, tune_lr=settings.tune_lr)
    fixed = {key: value for key, value in config.identity.items() if key not in searched}
    return fixed | {f"search {key}": value for key, value in settings.identity.items()}


@dataclass(frozen=True)
class Search:
    """A search as one of its processes does it. It can be sent to another process.

    Attributes:
        config: The run that is repeated.
        settings: What is searched, and how.
        output: The folder of the trials.
        storage: URL of the database.
        name: Name of the study.
        workers: Processes that share the search, for the time left.
        quiet: Show nothing.
    """

    config: FinetuneConfig
    settings: SearchConfig
    output: Path
    storage: str
    name: str
    workers: int
    quiet: bool

    def open(self) -> tuple[studies.SharedStudy, Space]:
        """The study, and what is searched, which the first process that asks finds out."""
        study = studies.open_study(
            studies.connect(self.storage),
            self.name,
            _identity(self.config, self.settings),
            direction="maximize" if self.settings.objective == "accuracy" else "minimize",
        )
        study.sampler = studies.SteadySampler(
            self.settings.sampler, startup=self.settings.startup, seed=self.settings.seed
        )
        study.pruner = self._pruner()
        if "space" not in study.user_attrs:
            study.set_user_attr("space", [[*vars(dimension).values()] for dimension in self._space()])
        searched = tuple(space.Dimension(*dimension) for dimension in study.user_attrs["space"])
        limit = self.settings.trials if searched else 1
        folder = self.output / "trials" / ".studies" / re.sub(r"[^\w.-]+", "-", self.name)
        return studies.SharedStudy(study, limit, folder), searched

    def work(self) -> None:
        """Make trials until all have ended, those of other processes included."""
        study, searched = self.open()
        story, display = self._story(study)
        # Several bars on one terminal would write over each other.
        with display if self.workers == 1 else nullcontext():
            while len(study.finished()) < study.limit:
                self._one(study, searched, story)

    def finished(self) -> int:
        """How many trials have ended."""
        return trials_done(self.storage, self.name)

    def advance(self) -> str | None:
        """Make one trial; returns what came out, in a line, or ``None``, after a little, where others hold all."""
        study, searched = self.open()
        story, _ = self._story(study)
        return self._one(study, searched, story)

    def best(self) -> Best:
        """What the trials that have ended found."""
        study, searched = self.open()
        ended = study.finished()
        best = study.best()
        if best is None:
            raise NonFiniteWeightError(
                f"No trial of study {self.name} came to a result: {sum(map(studies.diverged, ended))} of"
                f" {len(ended)} diverged. Search lower learning rates: --lr, or --tune-lr with --lr-range LOW HIGH."
            )
        assert best.value is not None
        values = studies.short(best.params)
        return Best(
            values=values,
            value=best.value,
            trial=best.number,
            finished=len(ended),
            pruned=sum(trial.state == TrialState.PRUNED for trial in ended),
            diverged=sum(map(studies.diverged, ended)),
            study=self.name,
            storage=studies.shown(self.storage),
            objective=self.settings.objective,
            space=searched,
            config=self._with(values),
        )

    # -------------------------------------------------------------------------------------------------- one trial

    def _story(self, study: studies.SharedStudy) -> tuple[Story, Display]:
        epochs = self.config.epochs
        done = len(study.finished()) * epochs
        display = Display(f"{self.config.method} search", study.limit * epochs, done=done, quiet=self.quiet)
        return Story(study, self.settings, epochs=epochs, workers=self.workers, display=display), display

    def _one(self, study: studies.SharedStudy, searched: Space, story: Story) -> str | None:
        """Make a trial that is free, if there is one."""
        with study.claim() as trial:
            if trial is not None:
                return self._make(study, trial, searched, story)
        story.waiting()
        time.sleep(_POLL_SECONDS)
        return None

    def _make(self, study: studies.SharedStudy, trial: Trial, searched: Space, story: Story) -> str:
        """Ask for the values of a trial that this process holds, run it, and tell what came out, in a line too."""
        values = studies.short({d.key: trial.suggest_float(d.key, d.low, d.high, log=True) for d in searched})
        config = self._of_trial(values)
        watch = _Watch(trial, self.settings) if self.settings.prune else None
        part = {"kind": "trial", "study": self.name, "number": trial.number}

        def on_epoch(line: Mapping[str, Any]) -> None:
            story.epoch(line["epoch"])
            if watch is not None and line["epoch"] < config.epochs:
                watch(line)

        value: float | None
        try:
            if watch is not None:
                watch.catch_up(config)
            outcome = _when_free(config, part, on_epoch).info["outcome"]
            value, state = float(outcome[f"validation_{self.settings.objective}"]), TrialState.COMPLETE
        except NonFiniteWeightError as error:
            value, state = 0.0 if self.settings.objective == "accuracy" else math.inf, TrialState.COMPLETE
            trial.set_user_attr(studies.DIVERGED, str(error))
        except optuna.TrialPruned:
            value, state = None, TrialState.PRUNED
        study.tell(trial, value, state)
        _drop_states(config)
        return story.ended(trial.number, values)

    def _with(self, values: Mapping[str, float]) -> FinetuneConfig:
        """The configuration with other values of what is searched."""
        cleared: dict[str, Any] = dict.fromkeys(METHODS[self.config.method].accepts)
        return replace(self.config, **cleared | dict(values))

    def _of_trial(self, values: Mapping[str, float]) -> FinetuneConfig:
        """The same, in the folder of the trials, with this process's share of the cores."""
        share = max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else None
        threads = self.config.threads or share
        return replace(self._with(values), output=str(self.output / "trials"), threads=threads)

    def _pruner(self) -> BasePruner:
        if not self.settings.prune:
            return NopPruner()
        return MedianPruner(n_startup_trials=self.settings.startup, n_warmup_steps=self.config.epochs // 4)

    def _space(self) -> Space:
        """What is searched, after an epoch without a constraint where that is needed to tell."""
        method, settings = self.config.method, self.settings
        movement = self._movement() if space.needs_movement(method, settings.space) else None
        return space.space(
            method,
            kind=settings.space,
            tune_lr=settings.tune_lr,
            lr_range=settings.lr_range,
            head=self.config.head,
            movement=movement,
        )

    def _movement(self) -> Movement:
        """How far the layers go in one epoch in which every radius is infinite."""
        free = self._of_trial({"radius": math.inf})
        probe = replace(free, epochs=1, schedule="constant", gradients=False, retain=None, retain_size=None, keep=None)
        part = {"kind": "trial", "study": self.name, "number": None}
        layers = _when_free(probe, part, None).distances["layers"].values()
        norm = METHODS[self.config.method].norm
        assert norm is not None
        body = [layer[norm] for layer in layers if layer["role"] == "body"]
        (head,) = (layer[norm] for layer in layers if layer["role"] == "head")
        return Movement(median(body), max(body), head)


class _Watch:
    """Reports the objective of a trial at the end of its epochs, once each, and stops the trial when it is behind."""

    def __init__(self, trial: Trial, settings: SearchConfig) -> None:
        self._trial = trial
        self._key = f"validation_{settings.objective}"
        self._reported = {*trial.study._storage.get_trial(trial._trial_id).intermediate_values}

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take in a line of metrics. Epochs that a resumed run repeats were dealt with before."""
        if self._report(line) and self._trial.should_prune():
            raise optuna.TrialPruned

    def catch_up(self, config: FinetuneConfig) -> None:
        """Take in what a run that was killed left, whose last epoch may not have been reported, or not acted upon."""
        folder = RunFolder(config)
        if folder.status() == "running":
            for line in runs.load(folder.path).metrics:
                if line["epoch"] < config.epochs:
                    self._report(line)
            if self._reported and self._trial.should_prune():
                raise optuna.TrialPruned

    def _report(self, line: Mapping[str, Any]) -> bool:
        value, epoch = line[self._key], line["epoch"]
        if value is None or epoch in self._reported:
            return False
        self._trial.report(value, epoch)
        self._reported.add(epoch)
        return True


def _when_free(
    config: FinetuneConfig,
    part: Mapping[str, Any],
    on_epoch: Callable[[Mapping[str, Any]], None] | None,
) -> Run:
    """Make a run, after whoever is making the same one, for another study or as a probe, has ended."""
    while True:
        try:
            return finetune(config, quiet=True, part=part, on_epoch=on_epoch)
        except RunInUseError:
            time.sleep(_POLL_SECONDS)


def _drop_states(config: FinetuneConfig) -> None:
    """Remove the large files that a trial which was stopped or diverged leaves to go on from."""
    folder = RunFolder(config)
    if folder.states.exists():
        try:
            with folder.own():
                folder.drop_states()
        except RunInUseError:
            return


def _in_processes(work: Callable[[], None], count: int) -> None:
    """Do the same work in several processes, which end when this one does; the first error ends all."""
    pool = processes(count)
    try:
        for future in as_completed([pool.submit(work) for _ in range(count)]):
            future.result()
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown()
