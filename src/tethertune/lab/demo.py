"""``make demo``: every method of the paper on real images with real weights, in a few minutes on two cores.

Ten images a class and the authors' head (flattened, Glorot-initialised) are where the paper's gaps are largest. One
row stands beside them that needs no method at all: a pooled, zero-initialised head at a lower learning rate.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tethertune.lab.config import FinetuneConfig

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["configurations", "run"]

SEEDS = (1, 2, 3)

_SETTING: dict[str, Any] = {
    "model": "lite0",
    "data": "fashion",
    "per_class": 10,
    "size": 48,
    "batch_size": 20,
    "epochs": 12,
    "optimizer": "amsgrad",
    "lr": 5e-4,
    "schedule": "step",
    "bn": "frozen",
    "head": "flatten",
    "eval_every": 4,
    "threads": 1,
}
_ROWS: tuple[dict[str, Any], ...] = (
    {"method": "none"},
    {"method": "l2-sp", "strength": 0.1, "head_strength": 0.1},
    {"method": "mars-sp", "strength": 0.001, "head_strength": 0.01},
    {"method": "delta", "strength": 3.0, "head_strength": 0.1},
    {"method": "l2-pgm", "radius": 0.3, "head_radius": 0.3},
    {"method": "mars-pgm", "relative_radius": 0.02, "head_radius": 3.0},
    {"method": "none", "head": "pool", "lr": 3e-4},
)


def configurations(output: Path) -> list[FinetuneConfig]:
    """The runs of the demo, seed by seed, so that every method has been seen before the second seed begins."""
    return [
        FinetuneConfig(**_SETTING | row | {"seed": seed, "output": str(output / "runs")})
        for seed in SEEDS
        for row in _ROWS
    ]


def run(output: Path) -> Path:
    """Make all runs in one-thread processes, one a core; print the answer and its table; write the report.

    Runs that are complete are not made again.

    Args:
        output: The folder of ``runs/`` and ``report.html``.

    Returns:
        The report.
    """
    from rich.console import Console

    from tethertune.lab.report import write

    console = Console(width=None if os.isatty(1) else 160, highlight=False, markup=False)
    began = time.monotonic()
    configs = configurations(output)
    for number, line in enumerate(_outcomes(configs), 1):
        console.print(f"[{number:2}/{len(configs)}, {time.monotonic() - began:3.0f} s] {line}")
    report = write([output / "runs"], output / "report.html")
    _show(output / "runs", console)
    console.print(f"\nThe report, with curves and what each layer did: {report}")
    return report


def _outcomes(configs: list[FinetuneConfig]) -> Iterator[str]:
    """A line a run, as they end; after an error, those that have not begun never do."""
    pool = ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_finetune, config) for config in configs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _finetune(config: FinetuneConfig) -> str:
    from tethertune.lab.training import finetune

    outcome = finetune(config, quiet=True).info["outcome"]
    head = f"{config.head} head, lr {config.lr:g}"
    accuracy, seconds = outcome["test_accuracy"], outcome["seconds"]
    return f"{config.method:8} seed {config.seed}, {head:23} test accuracy {accuracy:.1%}, {seconds:.0f} s"


def _show(runs: Path, console: "Console") -> None:
    """Print the report's answer, and its table without the columns that a terminal has no room for."""
    from rich.table import Table

    from tethertune.lab.report import answer, grouping, tables
    from tethertune.lab.runs import find

    (comparison,) = grouping.compare(find([runs]))
    found, results = answer.answer(comparison), tables.results(comparison)
    kept = [i for i, name in enumerate(results.columns) if not name.startswith(("Seeds", "To the best", "Time"))]
    table = Table(title=results.caption, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i in kept:
        table.add_column(results.columns[i])
    for row in results.rows:
        table.add_row(*(row[i].text for i in kept))
    console.print()
    console.print(table)
    for text in ("", found.headline, *found.details, *answer.tether(comparison)):
        console.print(text)
