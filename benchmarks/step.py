"""What a constraint or a penalty costs beside the optimiser's step, and what the same costs done otherwise.

Two tables a network. The first is in multiples of ``torch.optim.Adam(fused=True).step()`` of the same parameters: what
runs before or after that step. The second is of optimisers that hold the balls in their own pass over the weights, in
multiples of the same optimiser of PyTorch, fused, without any ball. All of one table run in turn in one process.

"Inside": nothing is outside of its ball, the usual state with a loose radius. "Outside": before each call every row
(MARS) or layer (Frobenius) is moved outside. A "stream" moves the same bytes and computes next to nothing: the floor.

    python benchmarks/step.py --model resnet101 vit_base_patch16_224 --rounds 15
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import common
import torch
from common import Action
from setting import Norm, Setting, Streams

import tethertune as tt

NORMS: tuple[Norm, ...] = ("mars", "frobenius")
STATES = ("inside", "outside")
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {}),
    "AMSGrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {"weight_decay": 0.01}),
    "SGD momentum": ("SGD", {"momentum": 0.9}),
}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend."""
    before = os.environ.get("TETHERTUNE_BACKEND")
    os.environ["TETHERTUNE_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["TETHERTUNE_BACKEND"]
        if before is not None:
            os.environ["TETHERTUNE_BACKEND"] = before


def on(name: str, action: Action) -> Action:
    """The action, on a backend."""

    def run() -> None:
        with backend(name):
            action()

    return run


def around_the_step(setting: Setting, adam: torch.optim.Adam, device: str, *, compiled: bool) -> dict[str, Action]:
    """What runs beside an optimiser's step, whose state the other Adam shares."""
    streams = Streams(setting, device)
    floors = {
        ("mars", "inside"): streams.read,
        ("mars", "outside"): streams.read_and_write,
        ("frobenius", "inside"): streams.read,
        ("frobenius", "outside"): streams.read_then_write,
    }
    variants: dict[str, Action] = {"stream of Adam": streams.adam}
    foreach = torch.optim.Adam(setting.parameters, lr=0.0, foreach=True)
    if device == "cpu":  # elsewhere the fused one counts its steps on the device, which would stall the other
        foreach.state = adam.state
    variants["Adam foreach"] = foreach.step
    for norm, state in itertools.product(NORMS, STATES):
        variants[f"{norm} {state}: stream"] = floors[norm, state]
        variants[f"{norm} {state}: tethertune"] = setting.constraint(norm, state).project
        variants[f"{norm} {state}: tethertune, chunked"] = on("chunked", setting.constraint(norm, state).project)
        plain = setting.plain(norm, state)
        variants[f"{norm} {state}: torch.compile"] = plain.compiled() if compiled else plain.naive
        if not compiled:
            del variants[f"{norm} {state}: torch.compile"]
        variants[f"{norm} {state}: foreach"] = plain.foreach
        variants[f"{norm} {state}: naive loop"] = plain.naive
    euclidean = setting.constraint("mars", "outside", projection="euclidean")
    variants["mars outside, Euclidean: tethertune"] = euclidean.project
    return variants | penalties(setting, streams)


def penalties(setting: Setting, streams: Streams) -> dict[str, Action]:
    """The gradients of l2-SP and MARS-SP, added by a step's hook and by autograd."""
    variants: dict[str, Action] = {}
    for norm, name, floor in (
        ("frobenius", "l2-SP", streams.add_to_gradient),
        ("mars", "MARS-SP", streams.read),
    ):
        variants[f"{name}: stream"] = floor
        for way in ("tethertune", "tethertune, chunked"):
            penalty = tt.Penalty(setting.model, norm=norm, strength=1e-9, reference=setting.reference)
            step = hook_of(penalty, setting)
            variants[f"{name}: {way}"] = on("chunked", step) if "chunked" in way else step
        variants[f"{name}: autograd"] = partial(by_autograd, penalty)
    return variants


def hook_of(penalty: tt.Penalty, setting: Setting) -> Action:
    """What an attached penalty does before a step, without the step."""
    return partial(penalty._add_gradient, torch.optim.SGD(setting.parameters, lr=0.0))


def by_autograd(penalty: tt.Penalty) -> None:
    """The penalty in the loss, as if that had no other term."""
    penalty().backward()


def optimisers(setting: Setting, rule: str) -> tuple[Action, dict[str, Action]]:
    """PyTorch's fused optimiser of a rule, and ours with and without balls; they share one state."""
    name, options = RULES[rule]
    torchs = getattr(torch.optim, name)(setting.parameters, lr=0.0, fused=True, **options)
    torchs.step()

    def ours() -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(tt.optim, name)(setting.parameters, lr=0.0, **options)
        optimizer.state = torchs.state
        return optimizer

    def hooked(norm: Norm, state: str) -> Action:
        constraint = setting.constraint(norm, state)

        def step() -> None:
            torchs.step()
            constraint.project()

        return step

    def held(norm: Norm, state: str) -> Action:
        optimizer = ours()
        setting.constraint(norm, state).attach(optimizer)
        return optimizer.step

    variants: dict[str, Action] = {f"{rule}: tethertune, no ball": ours().step}
    for norm, state in itertools.product(NORMS, STATES):
        variants[f"{rule}: tethertune, {norm} {state}"] = held(norm, state)
        if rule == "Adam":
            variants[f"{rule} of PyTorch and a hook, {norm} {state}"] = hooked(norm, state)
    return torchs.step, variants


def run(setting: Setting, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both tables, as summaries by variant."""
    measure: Callable[..., dict[str, common.Timing]] = partial(
        common.measure,
        rounds=arguments.rounds,
        before=setting.move,
        device=arguments.device,
        cpu_time=common.alone(arguments),
    )
    adam = torch.optim.Adam(setting.parameters, lr=0.0, fused=True)
    adam.step()
    beside = measure(adam.step, around_the_step(setting, adam, arguments.device, compiled=arguments.compile))
    del adam
    own: dict[str, common.Timing] = {}
    for rule in RULES:
        base, variants = optimisers(setting, rule)
        own |= measure(base, variants)
        del base, variants
    return {
        "beside Adam": {name: timing.summary() for name, timing in beside.items()},
        "optimisers": {name: timing.summary() for name, timing in own.items()},
    }


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--model", nargs="+", default=["resnet101"], help="timm names, or 1b-block, 1b-block:4 (default: resnet101)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which compiles for minutes")
    arguments = parser.parse_args()
    common.start(arguments)
    results = {}
    for name in arguments.model:
        model = common.network(name).to(arguments.device, getattr(torch, arguments.dtype))
        setting = Setting.of(model)
        found = run(setting, arguments)
        title = f"{name}, {common.millions(model)}, {arguments.dtype}, {arguments.threads} thread(s)"
        common.print_ratios(
            f"{title}, {setting.constraint('mars', 'inside').backend} kernels", "Adam", found["beside Adam"]
        )
        common.print_ratios(title, "the same of PyTorch, fused", found["optimisers"])
        results[name] = {"parameters": sum(p.numel() for p in model.parameters()), "dtype": arguments.dtype, **found}
    common.record(arguments, results)


if __name__ == "__main__":
    main()
