"""Each run for the record: its configuration, the command that repeats it, its folder, and what it was made with."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tethertune.lab.report import formats
from tethertune.lab.report.grouping import Comparison, Group, is_over, outcome, seedless
from tethertune.lab.runs import Run

__all__ = ["Record", "Sheet", "Surroundings", "context"]

_SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        label: Its seed, and its method where that is not told by what stands above it.
        facts: What came out, name and value.
        command: The shell command that repeats it.
        folder: Its folder relative to the report.
        link: The same as a URL.
    """

    label: str
    facts: Sequence[tuple[str, str]]
    command: str
    folder: str
    link: str


@dataclass(frozen=True)
class Sheet:
    """What the runs of one group have in common, and the runs."""

    label: str
    method: str
    facts: Sequence[tuple[str, str]]
    config: Sequence[tuple[str, str]]
    records: Sequence[Record]


def context(comparison: Comparison) -> str:
    """What the comparison is made of, in a line: images, classes, runs."""
    finished = [run for group in comparison.groups for run in group.runs.values()]
    known = [*finished, *comparison.unfinished, *comparison.trials, *comparison.sweeps]
    data = known[0].info["data"]
    runs = "1 finished run" if len(finished) == 1 else f"{len(finished)} finished runs"
    told = [f"{len(data['classes'])} classes", f"{formats.sizes(data['sizes'])} images", runs, *_apart(comparison)]
    return "; ".join(told)


def _apart(comparison: Comparison) -> Iterator[str]:
    """The runs that are no results, in numbers."""
    if trials := len(comparison.trials):
        yield f"{trials} {'trial' if trials == 1 else 'trials'} of searches, in no mean"
    if sweeps := len(comparison.sweeps):
        yield f"{sweeps} {'run' if sweeps == 1 else 'runs'} of sweeps, in their figure alone"


class Surroundings:
    """Numbers the distinct versions and machines of the runs, and knows from where the report links to their folders.

    Args:
        home: The folder of the report.
        runs: All runs of the report, in its order.
    """

    def __init__(self, home: Path, runs: Iterable[Run]) -> None:
        self._home = home.resolve()
        self._described = list(dict.fromkeys(map(_surroundings, runs)))

    @property
    def described(self) -> list[str]:
        """Versions and machine of each, in the order of their numbers, which start at 1."""
        return [f"{versions}; {machine}" for versions, machine in self._described]

    def sheet(self, comparison: Comparison, group: Group) -> Sheet:
        """The sheet of a group."""
        first = next(iter(group.runs.values()))
        records = [self.record(run, f"seed {seed}") for seed, run in group.runs.items()]
        config = [(name, formats.value(value)) for name, value in seedless(first).items()]
        return Sheet(comparison.labels[group], group.method, _facts(first), config, records)

    def record(self, run: Run, label: str) -> Record:
        """The record of a run, finished or not."""
        folder = Path(os.path.relpath(run.path.resolve(), self._home)).as_posix()
        facts = _outcome(run) if is_over(run) else [("status", _progress(run))]
        made_on = ("made on", f"machine {self._described.index(_surroundings(run)) + 1}")
        return Record(label, [*facts, made_on], str(run.info.get("command", "")), folder, quote(folder) + "/")


def _outcome(run: Run) -> list[tuple[str, str]]:
    return [
        *([("status", "diverged, so its accuracy is not finite")] if run.diverged else []),
        ("test", formats.accuracy(outcome(run, "test_accuracy"))),
        (_validation(run), formats.accuracy(outcome(run, "validation_accuracy"))),
        ("training", formats.accuracy(outcome(run, "train_accuracy"))),
        ("time", formats.duration(outcome(run, "seconds"))),
        ("speed", f"{formats.number(outcome(run, 'images_per_second'), '.0f')} images/s"),
        ("peak memory", f"{formats.number(outcome(run, 'peak_memory_bytes') / 2**20, '.0f')} MiB"),
    ]


def _validation(run: Run) -> str:
    """What to call the accuracy on the validation images, which some runs were trained on."""
    both = run.info["config"].get("train_on") == "train+validation"
    return "validation (trained on)" if both else "validation"


def _progress(run: Run) -> str:
    done = run.metrics[-1]["epoch"] if run.metrics else 0
    return f"unfinished after epoch {done} of {run.info['config'].get('epochs')}; the same command resumes it"


def _facts(run: Run) -> list[tuple[str, str]]:
    data, model = run.info["data"], run.info["model"]
    classes = list(map(str, data["classes"]))
    named = ", ".join(classes[:_SHOWN_CLASSES]) + (", ..." if len(classes) > _SHOWN_CLASSES else "")
    facts = [
        ("images", f"{data['name']}: {formats.sizes(data['sizes'])}; {data['fingerprint']}"),
        (f"{len(classes)} classes", named),
        ("model", f"{model['name']}, {_count(model.get('parameters'))} parameters, from {model['source']}"),
        ("pre-trained weights", f"sha256 {model['weights_sha256']}" if model.get("weights_sha256") else "none"),
    ]
    constraint: Mapping[str, Any] | None = run.info.get("constraint")
    return [*facts, ("constraint", str(constraint["summary"]))] if constraint else facts


def _count(parameters: int | None) -> str:
    return f"{parameters:,}" if parameters is not None else "unknown"


def _surroundings(run: Run) -> tuple[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in run.info["versions"].items())
    machine = dict(run.info["machine"])
    memory = machine.pop("memory_bytes", None)
    words = [f"{name} {formats.value(value)}" for name, value in machine.items()]
    return versions, ", ".join([*words, *([f"memory {memory / 2**30:.1f} GiB"] if memory else [])])
