"""The memory that holding weights near pre-trained ones takes, by where the reference is kept.

Each way is measured in a process of its own, after a step of Adam, by what the system counts: the memory that the
process holds afterwards and did not before, apart from what is mapped from files, and the most that it has held in
between, while it was built and while three steps brought every row inside. On CUDA it is what PyTorch's allocator
counts there.

    python benchmarks/memory.py --model resnet101
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import common
import torch
from common import Action
from safetensors.torch import save_file
from setting import Plain
from torch import nn

import tethertune as tt
from tethertune import rows

MIB = 1 << 20
Build = Callable[[nn.Module, Path], Action]
"""From a network in its reference and the file of that to what runs after (or before) each step."""


def constraint(**options: Any) -> Build:
    """A constraint that every row is outside of."""

    def build(model: nn.Module, _file: Path) -> Action:
        return tt.Constraint(model, radius=1.0, **options).project

    return build


def from_file(model: nn.Module, file: Path) -> Action:
    """A constraint around a mapped file."""
    return tt.Constraint(model, radius=1.0, reference=file).project


def naive(model: nn.Module, _file: Path) -> Action:
    """A copy, and the formula tensor by tensor."""
    maps = [layer for layer in rows.layers(model) if not layer.rows.free]
    weights = [layer.weight for layer in maps]
    centres, radii = [w.detach().clone() for w in weights], [torch.tensor(1.0, device=w.device) for w in weights]
    return Plain([layer.rows for layer in maps], weights, centres, radii, "mars").naive


def penalty(model: nn.Module, _file: Path) -> Action:
    """l2-SP, its gradient added directly."""
    held = tt.Penalty(model, strength=1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return lambda: held._add_gradient(optimizer)


def penalty_in_the_loss(model: nn.Module, _file: Path) -> Action:
    """l2-SP by autograd."""
    held = tt.Penalty(model, strength=1e-9)
    return lambda: held().backward()  # type: ignore[no-untyped-call]


SCHEMES: dict[str, tuple[Build, str]] = {
    "snapshot (default)": (constraint(), "float32"),
    "snapshot of a bfloat16 checkpoint (default)": (constraint(), "bfloat16"),
    "reference_dtype=torch.bfloat16": (constraint(reference_dtype=torch.bfloat16), "float32"),
    "reference=FILE, mapped": (from_file, "float32"),
    "reference_device='cpu'": (constraint(reference_device="cpu"), "float32"),
    "naive loop and its copy": (naive, "float32"),
    "Penalty, attached": (penalty, "float32"),
    "Penalty, in the loss": (penalty_in_the_loss, "float32"),
}
"""How each is built, and the dtype of the checkpoint that the float32 weights come from."""


class OnTheHost:
    """What this process holds, in bytes, as Linux counts it."""

    def __init__(self) -> None:
        self.held()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def held(self) -> tuple[int, int, int]:
        """Its own, from files, and the most of both so far."""
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc gives back what was freed
            ctypes.CDLL(None).malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.partition(":")[0]: line.split()[1] for line in lines if "kB" in line}
        own, files, peak = (int(found[key]) * 1024 for key in ("RssAnon", "RssFile", "VmHWM"))
        return own, files, peak


class OnCuda:
    """What PyTorch holds on the GPU, in bytes."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def held(self) -> tuple[int, int, int]:
        """Its own, from files, and the most of both so far."""
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), 0, torch.cuda.max_memory_allocated()


def measure(name: str, model_name: str, device: str, file: Path) -> dict[str, Any]:
    """Measure one way in this process."""
    build, checkpoint = SCHEMES[name]
    model = common.network(model_name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, checkpoint)))
    model.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    adam.step()
    adam.zero_grad(set_to_none=False)
    constrained = sum(la.weight.numel() * la.weight.element_size() for la in rows.layers(model) if not la.rows.free)
    watch = OnCuda() if device.startswith("cuda") else OnTheHost()
    own, files, _ = watch.held()
    after_step = build(model, file)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        after_step()
    own_after, files_after, peak = watch.held()
    return {
        "constrained": constrained,
        "kept": own_after - own,
        "mapped": files_after - files,
        "peak": peak - own - files,
    }


def in_a_process(name: str, arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Measure one way in a new process."""
    words = ["--model", arguments.model, "--device", arguments.device, "--threads", str(arguments.threads)]
    command = [sys.executable, __file__, *words, "--measure", name, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very file
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="resnet101", help="a timm name or 1b-block (default: %(default)s)")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    common.start(arguments)
    if arguments.measure:
        name, file = arguments.measure
        print(json.dumps(measure(name, arguments.model, arguments.device, Path(file))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        model = common.network(arguments.model)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
        for name in SCHEMES:
            if "device" not in name or arguments.device != "cpu":
                results[name] = in_a_process(name, arguments, file)
    size = next(iter(results.values()))["constrained"]
    print(f"\n{arguments.model}, {common.millions(model)}, constrained {size / MIB:.1f} MiB, on {arguments.device}\n")
    cells = [
        [name, *(f"{found[key] / MIB:.1f}" for key in ("kept", "mapped", "peak")), f"{found['kept'] / size:.2f}"]
        for name, found in results.items()
    ]
    print("\n".join(common.table(["MiB", "kept", "mapped", "peak", "kept / weights"], cells)))
    common.record(arguments, {"model": arguments.model, "schemes": results})


if __name__ == "__main__":
    main()
