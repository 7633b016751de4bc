"""How the step grows: with the number of weights, the length of rows, and the number of tensors.

All are MARS balls, float32. Weights: maps of 1024 x 1024 inside their balls, as many as it takes, beside a stream that
reads the same weights and reference. Rows: 4 million weights in rows of 9 to a million, inside and outside, beside
Adam. Tensors: 10 to 1,000 maps of 8 x 8, where nothing but the cost of a tensor is left.

    python benchmarks/scale.py --most 1.1e9
"""

import argparse
from typing import Any

import common
import torch
from setting import Setting
from step import hook_of
from torch import nn

import tethertune as tt
from tethertune import rows

ROWS = (9, 64, 576, 4608, 65_536, 1_048_576)
TENSORS = (10, 30, 100, 300, 1000)
MOST_WITH_ADAM = 1e8  # weights; five copies of them


def maps(count: int, units: int, inputs: int, device: str) -> nn.Module:
    """That many linear maps of a shape."""
    return nn.ModuleList(nn.Linear(inputs, units, bias=False, device=device) for _ in range(count))


def by_weights(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Nanoseconds a weight of the step and, where its state fits, of Adam; and the step's ratio to a stream."""
    model = maps(count, 1024, 1024, arguments.device)
    reference = tt.Reference.of(model)
    constraint = tt.Constraint(model, radius=1e6, reference=reference)
    pairs = [(layer.weight.detach().view(-1), reference[layer.name].view(-1)) for layer in rows.layers(model)]

    def stream() -> None:
        for weight, centre in pairs:
            torch.dot(weight, centre)

    variants: dict[str, common.Action] = {"step": constraint.project}
    weights = count << 20
    if weights <= MOST_WITH_ADAM:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        variants["Adam"] = torch.optim.Adam(model.parameters(), lr=0.0, fused=True).step
    found = common.measure(
        stream, variants, rounds=arguments.rounds, device=arguments.device, cpu_time=common.alone(arguments)
    )
    summaries = {name: timing.summary() for name, timing in found.items()}
    nanoseconds = {name: round(found["milliseconds"] * 1e6 / weights, 3) for name, found in summaries.items()}
    return {"weights": weights, "tensors": count, "ratio to stream": summaries["step"]["ratio"], "ns": nanoseconds}


def by_rows(columns: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The step's ratio to Adam, inside and outside."""
    setting = Setting.of(maps(1, max(1, (1 << 22) // columns), columns, arguments.device))
    adam = torch.optim.Adam(setting.parameters, lr=0.0, fused=True)
    variants = {state: setting.constraint("mars", state).project for state in ("inside", "outside")}
    found = common.measure(
        adam.step,
        variants,
        rounds=arguments.rounds,
        before=setting.move,
        device=arguments.device,
        cpu_time=common.alone(arguments),
    )
    return {"columns": columns, **{name: timing.summary()["ratio"] for name, timing in found.items()}}


def by_tensors(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a tensor of everything that goes through all of them."""
    setting = Setting.of(maps(count, 8, 8, arguments.device))
    adam = torch.optim.Adam(setting.parameters, lr=0.0, fused=True)
    ours = tt.optim.Adam(setting.parameters, lr=0.0)
    ours_held = tt.optim.Adam(setting.parameters, lr=0.0)
    setting.constraint("mars", "inside").attach(ours_held)
    penalty = tt.Penalty(setting.model, strength=1e-9, reference=setting.reference)
    plain = setting.plain("mars", "inside")
    variants: dict[str, common.Action] = {
        "project": setting.constraint("mars", "inside").project,
        "Adam of PyTorch": adam.step,
        "our Adam": ours.step,
        "our Adam with balls": ours_held.step,
        "Penalty": hook_of(penalty, setting),
        "foreach": plain.foreach,
        "naive loop": plain.naive,
    }
    found = common.measure(
        adam.step, variants, rounds=4 * arguments.rounds, device=arguments.device, cpu_time=common.alone(arguments)
    )
    return {
        "tensors": count,
        "us": {name: round(timing.summary()["milliseconds"] * 1e3 / count, 3) for name, timing in found.items()},
    }


def print_all(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the three tables."""
    cells = []
    for found in results["weights"]:
        low, median, high = found["ratio to stream"]
        adam = found["ns"].get("Adam")
        share = ["", ""] if adam is None else [f"{adam:.2f}", f"{found['ns']['step'] / adam:.2f}"]
        size = f"{found['weights'] / 1e6:.0f} M"
        cells.append([size, f"{found['ns']['step']:.2f}", f"{median:.2f}", f"{low:.2f}-{high:.2f}", *share])
    head = ["weights", "ns a weight", "time / stream", "quartiles", "Adam, ns a weight", "time / Adam"]
    print("\n".join(["", *common.table(head, cells)]))
    cells = []
    for found in results["rows"]:
        inside, outside = (f"{m:.2f} ({lo:.2f}-{hi:.2f})" for lo, m, hi in (found["inside"], found["outside"]))
        cells.append([f"{found['columns']:,}", inside, outside])
    print("\n".join(["", *common.table(["weights a row", "inside, time / Adam", "outside, time / Adam"], cells)]))
    names = list(results["tensors"][0]["us"])
    cells = [[f"{found['tensors']:,}", *(f"{found['us'][name]:.2f}" for name in names)] for found in results["tensors"]]
    print("\n".join(["", *common.table(["tensors of 8 x 8, us a tensor", *names], cells)]))


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = common.parser(__doc__, rounds=9)
    parser.add_argument("--most", type=float, default=3e8, help="weights; 8 bytes each (default: %(default)g)")
    arguments = parser.parse_args()
    common.start(arguments)
    counts = [count for count in (4**k for k in range(6)) if count << 20 <= arguments.most]
    results = {
        "weights": [by_weights(count, arguments) for count in counts or [1]],
        "rows": [by_rows(columns, arguments) for columns in ROWS],
        "tensors": [by_tensors(count, arguments) for count in TENSORS],
    }
    print_all(results)
    common.record(arguments, results)


if __name__ == "__main__":
    main()
