"""What the benchmarks share: interleaved rounds, medians with quartiles, tables, and records that name the machine.

A variant is timed right after the base it is compared with, in one process and on one thread unless asked otherwise,
so that whatever else a machine does disturbs both alike; a round gives one ratio a variant. Only such ratios compare:
times of two processes, or of two minutes, do not.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tethertune.lab import machine

Action = Callable[[], object]


@dataclass
class Timing:
    """The times of one variant and of the base beside it, in seconds, one a round."""

    seconds: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Of the variant to the base, in each round."""
        return [own / base for own, base in zip(self.seconds, self.base, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Quartiles of the ratios, the median time in milliseconds, and the number of rounds."""
        return {
            "ratio": [round(value, 4) for value in quartiles(self.ratios)],
            "milliseconds": round(1e3 * statistics.median(self.seconds), 4),
            "rounds": len(self.seconds),
        }


def measure(
    base: Action,
    variants: Mapping[str, Action],
    *,
    rounds: int,
    before: Action | None = None,
    warm_up: int = 2,
    device: str = "cpu",
    cpu_time: bool = False,
) -> dict[str, Timing]:
    """Time every variant, each right after the base, in rounds.

    Args:
        base: What all are compared with.
        variants: By name.
        rounds: How many count.
        before: Runs before each pair, not timed: to move weights out of their balls again, say.
        warm_up: Rounds before those that count.
        device: Where they run; on an accelerator the clock waits for it.
        cpu_time: Count the time of this process on the processor, not that on the clock on the wall: what a thread
            alone has to do, even while others wait for the same core.
    """
    timings = {name: Timing() for name in variants}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + warm_up):
            for name, action in variants.items():
                if before is not None:
                    before()
                of_base, own = (timed(a, device, cpu_time=cpu_time) for a in (base, action))
                if number >= warm_up:
                    timings[name].base.append(of_base)
                    timings[name].seconds.append(own)
    finally:
        gc.enable()
    return timings


def timed(action: Action, device: str = "cpu", *, cpu_time: bool = False) -> float:
    """Seconds, from an idle device to an idle device."""
    clock = time.process_time if cpu_time else time.perf_counter
    _wait_for(device)
    start = clock()
    action()
    _wait_for(device)
    return clock() - start


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value, that value."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, its columns aligned: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    for number, row in enumerate([head, *rows]):
        cells = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            rules = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
            yield f"| {' | '.join(rules)} |"


def ratio_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows (variant, median, quartiles, ms) of what :meth:`Timing.summary` gave for each variant."""
    rows = []
    for name, found in results.items():
        low, median, high = found["ratio"]
        rows.append([name, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{found['milliseconds']:.2f}"])
    return rows


def print_ratios(title: str, base: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of summaries as they are in a record."""
    print(f"\n{title}\n")
    print("\n".join(table([f"time / {base}", "median", "quartiles", "ms"], ratio_rows(results))), flush=True)


def parser(description: str | None, *, rounds: int = 15) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="how many rounds count (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="of the processor (default: %(default)s)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    made.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    return made


def alone(arguments: argparse.Namespace) -> bool:
    """Whether one thread of the processor does everything, so that its own time says what it has to do."""
    return arguments.threads == 1 and arguments.device == "cpu"


def start(arguments: argparse.Namespace) -> None:
    """Take as many threads as asked for, and the same random numbers every time."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)


def record(arguments: argparse.Namespace, results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the command and the machine that gave them; written where ``--json`` says."""
    options = " ".join(shlex.quote(word) for word in _without_json(sys.argv[1:]))
    found = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {options}".strip(),
        "machine": machine.describe(torch.device(arguments.device)),
        "versions": machine.versions(),
        "results": dict(results),
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _without_json(words: Sequence[str]) -> list[str]:
    """The command without where its record goes, which says nothing about the results."""
    kept = list(words)
    if "--json" in kept:
        at = kept.index("--json")
        del kept[at : at + 2]
    return [word for word in kept if not word.startswith("--json=")]


def network(name: str) -> nn.Module:
    """A timm model by its name, with random weights, or ``"1b-block"``, ``"1b-block:4"``: blocks of a language model.

    The block is one of 22 of a Llama of 1.1 billion parameters (TinyLlama: width 2048, 32 heads, 4 of them for keys
    and values, 5632 hidden units): 44 million parameters in seven linear maps.
    """
    if not name.startswith("1b-block"):
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False)
        return model
    count = int(name.partition(":")[2] or 1)
    shapes = {"q": (2048, 2048), "k": (2048, 256), "v": (2048, 256), "o": (2048, 2048)}
    shapes |= {"gate": (2048, 5632), "up": (2048, 5632), "down": (5632, 2048)}
    blocks = [nn.ModuleDict({n: nn.Linear(*shape, bias=False) for n, shape in shapes.items()}) for _ in range(count)]
    return nn.ModuleList(blocks)


def millions(model: nn.Module) -> str:
    """The number of parameters as ``"44.5 M parameters"``."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"
