"""What the constraint costs beside the optimiser's step: ratios to a fused Adam step of the same parameters.

Every variant and Adam run in turn, in one process and on one thread, so that a noisy machine disturbs all of them
alike; a round gives one ratio a variant, and the table shows their median and quartiles.

    python benchmarks/step.py --model resnet101 --rounds 11
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import tethertune as tt
from tethertune import norms, rows


def naive(layers: list[rows.Layer], reference: tt.Reference, radii: dict[str, float], norm: str) -> None:
    """A direct port: a loop over the tensors that applies the formula to all of each, in float32."""
    with torch.no_grad():
        for layer in layers:
            T = layer.rows.matrix(layer.weight - reference[layer.name])
            size = T.abs().sum(1, keepdim=True) if norm == "mars" else T.square().sum().sqrt()
            projected = T * (1 / (size / radii[layer.name]).clamp(min=1))
            layer.weight.copy_(reference[layer.name] + projected.view(layer.weight.shape))


def radii_inside_every_row(
    layers: list[rows.Layer], moved: dict[str, Tensor], reference: tt.Reference
) -> dict[str, dict[str, float]]:
    """For each norm, radii that every row (MARS) or layer (Frobenius) is outside of by at least 5 %."""
    T = {layer.name: layer.rows.matrix(moved[layer.name] - reference[layer.name]) for layer in layers}
    return {
        "mars": {name: float(norms.row_sums(t).min()) / 1.05 for name, t in T.items()},
        "frobenius": {name: float(norms.frobenius(t)) / 1.05 for name, t in T.items()},
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """The ratio of each variant to Adam's fused step in each round."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    adam = torch.optim.Adam(parameters, lr=0.0, fused=True)
    foreach = torch.optim.Adam(parameters, lr=0.0, foreach=True)
    layers = [layer for layer in rows.layers(model) if not layer.rows.free]
    reference = tt.Reference.of(model)
    moved = {layer.name: reference[layer.name] + 1e-3 * torch.randn_like(layer.weight) for layer in layers}
    tight = radii_inside_every_row(layers, moved, reference)
    ratios: dict[str, list[float]] = {}

    def move() -> None:
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(moved[layer.name])

    variants: dict[str, Callable[[], object]] = {"Adam foreach": foreach.step}
    for norm in ("mars", "frobenius"):
        for state, radii in (("inside", dict.fromkeys(tight[norm], 1e6)), ("all outside", tight[norm])):
            constraint = tt.Constraint(model, norm=norm, radius=radii, reference=reference)
            variants[f"tethertune {norm}, {state}"] = constraint.project
            variants[f"naive loop {norm}, {state}"] = lambda n=norm, r=radii: naive(layers, reference, r, n)
    for number in range(rounds + 2):
        for name, action in variants.items():
            move()
            base = timed(adam.step)
            ratio = timed(action) / base
            if number >= 2:
                ratios.setdefault(name, []).append(ratio)
    return ratios


def main() -> None:
    """Print the table, and write the ratios as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet101", help="any timm name, with random weights")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the ratios of every round to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import timm

    model = timm.create_model(arguments.model)
    size = sum(parameter.numel() for parameter in model.parameters())
    ratios = measure(model, arguments.rounds)
    print(f"{arguments.model}, {size / 1e6:.1f} M parameters, float32, {arguments.threads} thread(s)")
    print(f"{'time / Adam(fused=True).step()':34} {'median':>7} {'quartiles':>15}")
    for name, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:34} {median:7.2f} {low:7.2f}-{high:.2f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"model": arguments.model, "parameters": size, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    main()
