"""Write the tables of ``docs/performance.md`` from the records in ``docs/performance/``.

Usage: ``python scripts/make_performance.py``. A record is what a script in ``benchmarks/`` wrote with ``--json``:
``step-*.json`` of ``step.py`` (a network or a dtype each), ``rivals.json``, ``memory.json`` and ``scale.json`` of the
script of that name. Each table stands between two comments,
``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``; the rest of the page is written by hand.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RECORDS = ROOT / "docs" / "performance"
MIB = 1 << 20

AIMS = (
    ("hook, inside", 0.50, ("mars inside: tethertune", "frobenius inside: tethertune")),
    ("hook, MARS outside", 0.65, ("mars outside: tethertune",)),
    ("hook, Frobenius outside", 1.00, ("frobenius outside: tethertune",)),
    ("hook, Euclidean MARS outside", 3.00, ("mars outside, Euclidean: tethertune",)),
    ("l2-SP", 1.50, ("l2-SP: tethertune",)),
    ("MARS-SP", 1.50, ("MARS-SP: tethertune",)),
    *(
        (f"fused {rule}, {what}", aim, tuple(f"{rule}: tethertune, {norm} {state}" for norm in norms))
        for rule in ("Adam", "AMSGrad", "AdamW", "SGD momentum")
        for what, state, aim, norms in (
            ("inside", "inside", 1.10, ("mars", "frobenius")),
            ("MARS outside", "outside", 1.40, ("mars",)),
            ("Frobenius outside", "outside", 1.40, ("frobenius",)),
        )
    ),
)
"""What the step aims at: a name, the ratio, and the variants that are to keep it."""

SEVEN_BILLION = 6_738_415_616  # Llama 2 7B
BANDWIDTH = 4.3e12  # bytes a second, of a copy on an H200
LAYOUTS = (
    ("one GPU, all bfloat16", "bfloat16", 1),
    ("one GPU, float32 from a bfloat16 checkpoint", "float32", 1),
    ("the same on 64 GPUs", "float32", 64),
)
COSTS = (
    ("weights, gradients, two moments", "memory", 8, 16, 16),
    ("the reference", "memory", 2, 2, 2),
    ("Adam", "traffic", 14, 28, 28),
    ("+ MARS or Frobenius by the hook, inside", "traffic", 4, 6, 6),
    ("+ MARS by the hook, outside", "traffic", 6, 10, 10),
    ("+ Frobenius by the hook, outside", "traffic", 10, 16, 16),
    ("+ balls in the pass of the optimiser", "traffic", 2, 2, 2),
    ("+ l2-SP", "traffic", 8, 14, 14),
    ("+ naive loop", "traffic", 26, 48, 48),
)
"""What, of which kind, and the bytes a weight in each layout."""


def render(page: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with every table made anew.

    Args:
        page: The page as it is.
        records: By the name of their file.
    """
    for name, lines in tables(records).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        made = "\n".join([begin, "", *lines, "", end])
        page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, made=made: made, page, flags=re.DOTALL)
    return page


def tables(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Iterable[str]]:
    """The lines of every table by its name."""
    results = {name: record["results"] for name, record in records.items()}
    steps, scale = networks(results, "float32"), results["scale"]
    return {
        "commands": commands(records),
        "aims": aims(steps),
        "beside": side_by_side(steps, "beside Adam"),
        "optimisers": side_by_side(steps, "optimisers"),
        "bfloat16": side_by_side(networks(results, "bfloat16"), "beside Adam"),
        "bfloat16 optimisers": side_by_side(networks(results, "bfloat16"), "optimisers"),
        "rivals": rivals(results["rivals"]),
        "memory": memory(results["memory"]["schemes"]),
        "weights": weights(scale["weights"]),
        "rows": rows(scale["rows"]),
        "tensors": tensors(scale["tensors"]),
        "training": training({name: of for name, of in results.items() if name.startswith("train")}),
        "paper": on_paper(),
    }


def networks(results: Mapping[str, Mapping[str, Any]], dtype: str) -> dict[str, Mapping[str, Any]]:
    """What was measured of each network in a dtype, the smallest first."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, of_record in results.items():
        if name.startswith("step"):
            found |= {network: of for network, of in of_record.items() if of["dtype"] == dtype}
    return dict(sorted(found.items(), key=lambda item: item[1]["parameters"]))


def commands(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Which command gave each record, and the machine of all."""
    for name, record in records.items():
        yield f"- `{record['command']}` ({name}.json)"
    machine, versions = (next(iter(records.values()))[key] for key in ("machine", "versions"))
    size = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    yield ""
    yield f"{machine['processor']}, {machine['cores']} cores, {size}, torch {versions['torch']}, {machine['platform']}."


def aims(steps: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The worst of the variants that an aim is for, of each network; bold where it is missed."""
    yield from _head(["time / fused step", "aim", *(_title(name, of) for name, of in steps.items())])
    for name, aim, variants in AIMS:
        worst = [max(_all(of)[variant]["ratio"][1] for variant in variants) for of in steps.values()]
        cells = [f"{value:.2f}" if round(value, 2) <= aim else f"**{value:.2f}**" for value in worst]
        yield _row([name, f"{aim:.2f}", *cells])


def side_by_side(steps: Mapping[str, Mapping[str, Any]], table: str) -> Iterator[str]:
    """Medians and quartiles of every variant, a column a network."""
    base = "fused Adam step" if table == "beside Adam" else "the same step of PyTorch"
    yield from _head([f"time / {base}", *(_title(name, of) for name, of in steps.items())])
    for variant in next(iter(steps.values()))[table]:
        yield _row([variant, *(_ratio(of[table][variant]["ratio"]) for of in steps.values())])


def rivals(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Every method's step, what it keeps and what it leaves outside."""
    name, methods = next(reversed(results.items()))
    yield from _head(["time / fused Adam step", *results, "copies of the weights", f"rows left outside ({name})"])
    for name, found in methods.items():
        left = "" if found["outside"] is None else f"{found['outside']:.1%}"
        yield _row([name, *(_ratio(of[name]["ratio"]) for of in results.values()), str(found["copies"]), left])


def memory(schemes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What each way keeps and takes."""
    size = next(iter(schemes.values()))["constrained"]
    yield from _head([f"MiB, of {size / MIB:.0f} that are constrained", "kept", "kept / weights", "mapped", "most"])
    for name, found in schemes.items():
        kept, mapped, peak = (f"{found[key] / MIB:.0f}" for key in ("kept", "mapped", "peak"))
        yield _row([name, kept, f"{found['kept'] / size:.2f}", mapped, peak])


def weights(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The step of 1 million to a billion weights."""
    yield from _head(["weights", "tensors", "ns a weight", "time / stream", "Adam, ns a weight", "time / Adam"])
    for row in found:
        step, adam = row["ns"]["step"], row["ns"].get("Adam")
        beside = ["not measured", ""] if adam is None else [f"{adam:.2f}", f"{step / adam:.2f}"]
        cells = [f"{row['weights'] / 1e6:.0f} M", str(row["tensors"]), f"{step:.2f}", _ratio(row["ratio to stream"])]
        yield _row([*cells, *beside])


def rows(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The step of rows of every length."""
    yield from _head(["weights a row", "inside, time / Adam", "outside, time / Adam"])
    for row in found:
        yield _row([f"{row['columns']:,}", _ratio(row["inside"]), _ratio(row["outside"])])


def tensors(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The cost of a tensor."""
    names = list(found[0]["us"])
    yield from _head(["tensors of 8 x 8, \N{MICRO SIGN}s a tensor", *names])
    for row in found:
        yield _row([f"{row['tensors']:,}", *(f"{row['us'][name]:.1f}" for name in names)])


def training(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The speed of `finetune` as a share of a bare loop's."""
    yield from _head(["speed / bare loop", *(name.removeprefix("train-") for name in results)])
    for variant in next(iter(results.values())):
        cells = []
        for of in results.values():
            low, median, high = of[variant]["speed"]
            cells.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
        yield _row([variant, *cells])


def on_paper() -> Iterator[str]:
    """Bytes, and what they take, of a network of 7 billion weights."""
    yield from _head([f"{SEVEN_BILLION:,} weights", *(name for name, _, _ in LAYOUTS)])
    for what, kind, *counts in COSTS:
        cells = []
        for each, (_, _, shards) in zip(counts, LAYOUTS, strict=True):
            total = each * SEVEN_BILLION / shards
            amount = f"{total / 1e9:.2f} GB" if kind == "memory" else f"{1e3 * total / BANDWIDTH:.2f} ms"
            cells.append(f"{each} B, {amount}")
        yield _row([what, *cells])


def read() -> dict[str, dict[str, Any]]:
    """The records by the names of their files."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))}


def _all(network: Mapping[str, Any]) -> dict[str, Any]:
    return {**network["beside Adam"], **network["optimisers"]}


def _title(name: str, network: Mapping[str, Any]) -> str:
    return f"{name} ({network['parameters'] / 1e6:.1f} M)"


def _ratio(quartiles: Sequence[float]) -> str:
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def _head(cells: Sequence[str]) -> Iterator[str]:
    yield _row(cells)
    yield f"|{'|'.join(['---', *['---:'] * (len(cells) - 1)])}|"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__":
    main()
