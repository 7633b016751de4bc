"""What is shown while a search runs: a line for each trial that has ended, and on a terminal a bar."""

import shlex
from collections.abc import Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState

from tethertune.lab.display import Display
from tethertune.lab.space import SearchConfig
from tethertune.lab.studies import SharedStudy, diverged

if TYPE_CHECKING:
    from tethertune.lab.search import Best

__all__ = ["Story", "figure", "flags", "result"]


class Story:
    """Tells how a search goes.

    Args:
        study: The study.
        settings: How it is searched.
        epochs: Epochs of a trial.
        workers: Processes that share the work, for the time left.
        display: Where it is told.
    """

    def __init__(
        self, study: SharedStudy, settings: SearchConfig, *, epochs: int, workers: int, display: Display
    ) -> None:
        self._study = study
        self._settings = settings
        self._epochs = epochs
        self._workers = workers
        self._display = display
        self._ended = len(study.finished())
        self._named: set[int] = set()

    def epoch(self, epoch: int) -> None:
        """Move the bar to the end of an epoch of the trial at work."""
        words = f"trial {self._ended + 1} of {self._study.limit}"
        self._display.step(self._ended * self._epochs + epoch, lambda: words)

    def ended(self, number: int, values: Mapping[str, float]) -> str:
        """Tell of a trial that has just ended; returns what came out of it."""
        trials = self._study.finished()
        self._ended = len(trials)
        words = [f"trial {number}", flags(values)] if values else [f"trial {number}"]
        words += [self._result(trial) for trial in trials if trial.number == number]
        told = ", ".join(words)
        best = self._study.best()
        if best is not None:
            words.append(f"best {figure(best.value, self._settings.objective)} (trial {best.number})")
        left = self._study.limit - len(trials)
        if left and trials:  # none where the only one so far was ended by hand
            words.append(f"about {_duration(left * _typical_seconds(trials) / self._workers)} left")
        self._display.say(f"[{len(trials)}/{self._study.limit}] {', '.join(words)}")
        return told

    def waiting(self) -> None:
        """Others hold all that is left; of trials that only another machine can take over, a line each, once."""
        for trial in self._study.elsewhere():
            if trial.number not in self._named:
                self._named.add(trial.number)
                self._display.say(
                    f"Waiting for trial {trial.number}, which {trial.user_attrs.get('host', 'another machine')} makes"
                    f" in {trial.user_attrs.get('folder', 'a folder of its own')}. If it was stopped there, give the"
                    " command there again. If that place is lost, end the trial by hand: optuna tell --storage URL"
                    f" --study-name {shlex.quote(self._study.study.study_name)} --trial-number {trial.number}"
                    " --state fail"
                )

    def _result(self, trial: FrozenTrial) -> str:
        if trial.state == TrialState.PRUNED:
            return "stopped early"
        if diverged(trial):
            return "diverged"
        objective = self._settings.objective
        return f"validation {objective} {figure(trial.value, objective)}"


def result(best: "Best") -> str:
    """What a search found, and the command that trains with it."""
    counts = ((best.finished, "finished"), (best.pruned, "stopped early"), (best.diverged, "diverged"))
    told = ", ".join(f"{count} {what}" for count, what in counts if count)
    lines = [
        f"Study {best.study} in {best.storage}: trials {told}",
        f"Best validation {best.objective}: {figure(best.value, best.objective)}, of trial {best.trial}",
    ]
    for dimension in best.space:
        value = best.values[dimension.key]
        edge = dimension.edge(value)
        hint = f": at the {edge} end, where a wider range may hold a better one" if edge else ""
        name = dimension.key.replace("_", " ")
        lines.append(f"  {name} {value:g} (searched from {dimension.low:.4g} to {dimension.high:.4g}{hint})")
    if best.finished > 1:
        lines.append(
            f"The best of {best.finished} on the same validation images flatters: quote the test accuracy of a run of"
            " its own, over several seeds."
        )
    return "\n".join([*lines, "This trains with it:", best.config.command()])


def figure(value: float | None, objective: str) -> str:
    """An accuracy in per cent, or a loss."""
    assert value is not None
    return f"{value:.2%}" if objective == "accuracy" else f"{value:.4f}"


def flags(values: Mapping[str, float]) -> str:
    """Values as they are given on the command line."""
    return " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in values.items())


def _typical_seconds(trials: Iterable[FrozenTrial]) -> float:
    spans = [t.datetime_complete - t.datetime_start for t in trials if t.datetime_complete and t.datetime_start]
    return median(span.total_seconds() for span in spans)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
