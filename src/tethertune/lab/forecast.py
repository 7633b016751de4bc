"""``tethertune compare --dry-run``: what a comparison will make, and about how long it takes on this machine."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from tethertune.lab import compare, models, sources, splits
from tethertune.lab.comparison import Comparison
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.methods import METHODS
from tethertune.lab.progress import Plan
from tethertune.lab.report.formats import duration
from tethertune.lab.sources import published

__all__ = ["Estimate", "estimate", "show"]

_IMAGES = 2
"""In the timed batch."""


@dataclass(frozen=True)
class Estimate:
    """What a cell will make.

    Attributes:
        plan: How many trials, runs and runs of curves.
        sizes: Images of each split that a run uses.
        seconds: About how long all of it takes one process, on this machine.
        here: Whether the data set is on this machine; else the sizes are those that were published.
    """

    plan: Plan
    sizes: Mapping[str, int]
    seconds: float
    here: bool


def estimate(comparison: Comparison) -> list[Estimate]:
    """An estimate for each cell, from a timed step of each network at its size; nothing is downloaded or made.

    What was made before counts as if it were to be made again.

    Raises:
        TethertuneError: What is wrong with a network or a data set.
    """
    return [_of_cell(comparison, plan) for plan in compare.plan(comparison)]


def show(comparison: Comparison) -> None:
    """Print the estimates as a table, and what they come to."""
    from rich.console import Console
    from rich.table import Table

    found = estimate(comparison)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("Network", "Task", "Method"):
        table.add_column(column, no_wrap=True)
    for column in ("Trials", "Runs", "Curves", "Images (train, validation, test)", "Time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        plan, cell = row.plan, row.plan.cell
        sizes = ", ".join(f"{size:,}" for size in row.sizes.values()) + ("" if row.here else " *")
        counts = map(str, (plan.trial, plan.run, plan.sweep))
        table.add_row(cell.model, cell.task, cell.method, *counts, sizes, duration(row.seconds))
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False)
    console.print(table)
    if not all(row.here for row in found):
        console.print("* not on this machine yet: the sizes that were published")
    trials, runs, curves = (sum(getattr(row.plan, kind) for row in found) for kind in ("trial", "run", "sweep"))
    total = sum(row.seconds for row in found)
    workers = 1 if comparison.executor == "local" else comparison.workers
    console.print(
        f"\n{len(found)} cells: {trials} trials, {runs} runs and {curves} runs of curves."
        f" About {duration(total / workers)} with {workers} at a time on this machine, by a timed step of each network;"
        " what is there already takes no time."
    )


def _of_cell(comparison: Comparison, plan: Plan) -> Estimate:
    base = plan.cell.base
    sizes, classes, here = _sizes(base)
    step, look = _seconds_an_image(base.model, base.size, classes, base.threads or torch.get_num_threads())
    # DELTA looks at every image with the pre-trained network too.
    passes = step + (look if METHODS[base.method].kind == "features" else 0)
    evaluations = math.ceil(base.epochs / base.eval_every)
    held_out = sizes["validation"] * evaluations * look
    trial = sizes["train"] * base.epochs * passes + held_out
    both = sizes["train"] + (sizes["validation"] if comparison.retrain_on == "train+validation" else 0)
    run = both * base.epochs * passes + held_out + sizes["test"] * look
    return Estimate(plan, sizes, plan.trial * trial + (plan.run + plan.sweep) * run, here)


def _sizes(config: FinetuneConfig) -> tuple[dict[str, int], int, bool]:
    """Images of each split that a run uses, the number of classes, and whether the data set is here."""
    name, colon, _ = config.data.partition(":")
    known = published.PUBLISHED.get(name)
    if known is not None and not colon and not published.folder(name).exists():
        counts, classes, here = dict(known.sizes), known.classes, False
    else:
        source = sources.find(config.data)
        members = splits.complete(source.splits, source.labels, source.classes, config.seed)
        counts, classes, here = {split: len(members[split]) for split in members}, len(source.classes), True
    kept = {"train": config.per_class, "validation": config.validation_per_class, "test": config.test_per_class}
    sizes = {split: min(counts[split], (limit or counts[split]) * classes) for split, limit in kept.items()}
    return sizes, classes, here


@cache
def _seconds_an_image(model: str, size: int | None, classes: int, threads: int) -> tuple[float, float]:
    """Seconds to train on an image, and to look at it, with random weights, on the device that would be used."""
    loaded = models.load(model, classes=classes, size=size, head="pool", pretrained=False)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    network = loaded.model.to(device).to(memory_format=torch.channels_last).eval()
    images = torch.zeros(_IMAGES, 3, loaded.size, loaded.size, device=device).to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _timed(partial(_step, network, images)) / _IMAGES, _timed(partial(_look, network, images)) / _IMAGES
    finally:
        torch.set_num_threads(before)


def _step(network: nn.Module, images: torch.Tensor) -> None:
    network(images).square().mean().backward()
    network.zero_grad()


@torch.inference_mode()
def _look(network: nn.Module, images: torch.Tensor) -> None:
    network(images)


def _timed(call: Callable[[], None]) -> float:
    """The shorter of two calls after one that warms up."""
    call()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
