"""What a running command shows: a progress bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Mapping
from time import monotonic
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Display"]

_INTERVAL = 0.5


class Display:
    """Shows how a training run goes.

    Args:
        title: The run, in a word or two.
        steps: Optimiser steps of the whole run.
        done: Steps done before, by a run that is resumed.
        quiet: Show nothing, e.g. on any but the first process.
    """

    def __init__(self, title: str, steps: int, *, done: int = 0, quiet: bool = False) -> None:
        self._title = title
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._shown_at = monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID = self._bar.add_task(title, total=steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, figures: Callable[[], str]) -> None:
        """Move the bar, twice a second at most.

        Args:
            step: Steps done.
            figures: Called only when they are shown, because reading them makes the host wait for the device.
        """
        now = monotonic()
        if self._live and now - self._shown_at >= _INTERVAL:
            self._shown_at = now
            self._bar.update(self._task, completed=step, figures=figures())

    def epoch(self, line: Mapping[str, Any], epochs: int) -> None:
        """Print the figures of an epoch.

        Args:
            line: A line of ``metrics.jsonl``.
            epochs: Epochs of the whole run.
        """
        parts = [f"epoch {line['epoch']}/{epochs}", f"loss {line['loss']:.4f}", f"accuracy {line['accuracy']:.1%}"]
        if line["validation_accuracy"] is not None:
            parts.append(f"validation {line['validation_accuracy']:.1%}")
        parts.append(f"{line['images_per_second']:.0f} images/s")
        if line["at_radius"] is not None:
            parts.append(f"{line['at_radius']:.0%} of rows at their radius")
        self.say(f"{self._title}: {', '.join(parts)}")

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
