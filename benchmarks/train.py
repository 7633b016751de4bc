"""Whole training: `tethertune finetune` beside a bare PyTorch loop on the same images, network, batch and optimiser.

    python benchmarks/train.py --model lite0 --size 48 --methods none mars-pgm

`finetune` runs as it is, into a run folder; after each of its epochs the bare loop below does one of its own, so that
whatever else the machine does disturbs both alike. The bare loop is what one would write by hand: no constraint, no
record, no distances, nothing saved, nothing resumed. Two ratios come out: of the training steps alone, and of whole
epochs with the evaluation on the validation images, to which `finetune` adds distances, metrics and files. On a CPU the
clock is that of the process, which stands still while others have the cores.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import common
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tethertune.lab import inputs, sources
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.data import Split
from tethertune.lab.training import Training, finetune


class BareLoop:
    """Fine-tuning by hand, with the images in memory.

    Args:
        config: Read for what both must have in common.
        device: Where it runs.
    """

    def __init__(self, config: FinetuneConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        source = sources.find(config.data)
        loaded = inputs.network(config, classes=len(source.classes))
        dataset = inputs.dataset(config, loaded, source)
        self.train, self.validation = (_in_memory(split) for split in (dataset.train, dataset.validation))
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (loaded.mean, loaded.std))
        self.model = loaded.model.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, amsgrad=True, fused=True)
        self.forward: Any = torch.compile(self.model) if config.compile else self.model

    def train_epoch(self) -> float:
        """The mean loss of one epoch."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        images, labels = self.train
        total = torch.zeros((), device=self.device)
        for indices in torch.randperm(len(images)).split(self.config.batch_size):
            targets = labels[indices].to(self.device)
            with self._precision():
                loss = functional.cross_entropy(self.forward(self._prepared(images[indices])), targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach() * len(indices)
        return total.item() / len(images)

    @torch.inference_mode()
    def evaluate(self) -> float:
        """The accuracy on the validation images."""
        self.model.eval()
        images, labels = self.validation
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for part, of_part in zip(images.split(64), labels.split(64), strict=True):
            with self._precision():
                correct += (self.model(self._prepared(part, whole=True)).argmax(1) == of_part.to(self.device)).sum()
        return correct.item() / len(images)

    def _prepared(self, images: Tensor, *, whole: bool = False) -> Tensor:
        batch = images.to(self.device).float()
        if self.config.augment and not whole:
            batch = _cropped(batch)
        return ((batch / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")


def _in_memory(split: Split) -> tuple[Tensor, Tensor]:
    """Images (n, 3, size, size) uint8 and labels (n,)."""
    return split.batch(torch.arange(len(split))), torch.from_numpy(split.labels)


def _cropped(images: Tensor) -> Tensor:
    """Random resized crops and flips, of the sizes that `finetune --augment` takes."""
    area = torch.empty(len(images)).uniform_(0.35, 1)
    ratio = torch.empty(len(images)).uniform_(-1, 1).mul(0.2877).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    maps = torch.zeros(len(images), 2, 3)
    maps[:, 0, 0] = width * torch.randint(2, (len(images),)).mul(2).sub(1)
    maps[:, 1, 1] = height
    maps[:, 0, 2] = (1 - width) * torch.empty(len(images)).uniform_(-1, 1)
    maps[:, 1, 2] = (1 - height) * torch.empty(len(images)).uniform_(-1, 1)
    grid = functional.affine_grid(maps.to(images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


@contextmanager
def _as_by_hand() -> Iterator[None]:
    """Without the deterministic algorithms that `finetune` asks torch for, which a bare loop would not."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def measure(config: FinetuneConfig, rounds: int) -> dict[str, common.Timing]:
    """Epochs of `finetune` and of the bare loop by turns; the first of each does not count.

    Args:
        config: The run; of ``rounds + 1`` epochs.
        rounds: How many epochs count.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    bare = BareLoop(config, device)
    found = {"steps": common.Timing(), "epochs": common.Timing()}
    times = [clock()]  # when finetune began its epoch, and when its steps were done
    line = Training._line

    def when_the_steps_are_done(training: Training) -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock())
        return line(training)

    def by_turns(metrics: Mapping[str, Any]) -> None:
        times.append(clock())
        with _as_by_hand():
            bare.train_epoch()
            times.append(clock())
            bare.evaluate()
            times.append(clock())
        began, trained, ended, trained_by_hand, ended_by_hand = times
        if metrics["epoch"] > config.epochs - rounds:
            for name, own, base in (
                ("steps", trained - began, trained_by_hand - ended),
                ("epochs", ended - began, ended_by_hand - ended),
            ):
                found[name].seconds.append(own)
                found[name].base.append(base)
        times[:] = [clock()]

    with mock.patch.object(Training, "_line", when_the_steps_are_done):
        finetune(config, fresh=True, quiet=True, on_epoch=by_turns)
    return found


def speeds(timing: common.Timing, images: int) -> dict[str, Any]:
    """Quartiles of how fast `finetune` is beside the bare loop (1: as fast), and both in images per second."""
    return {
        "speed": [round(value, 4) for value in common.quartiles([1 / ratio for ratio in timing.ratios])],
        "images_per_second": round(images / statistics.median(timing.seconds), 1),
        "by_hand": round(images / statistics.median(timing.base), 1),
        "rounds": len(timing.seconds),
    }


def print_speeds(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of what :func:`speeds` gave."""
    rows = []
    for name, found in results.items():
        low, median, high = found["speed"]
        rows.append([name, f"{median:.3f}", f"{low:.3f}-{high:.3f}", *map(str, _pace(found))])
    head = ["speed / bare loop", "median", "quartiles", "images/s", "bare loop"]
    print(f"\n{title}\n")
    print("\n".join(common.table(head, rows)), flush=True)


def _pace(found: Mapping[str, Any]) -> tuple[float, float]:
    return found["images_per_second"], found["by_hand"]


def configured(arguments: argparse.Namespace, method: str, folder: str) -> FinetuneConfig:
    """The run that is measured; a network without published weights on this machine has random ones."""
    weights = None
    if arguments.model != "lite0":
        weights = f"{folder}/weights.safetensors"
        save_file(common.network(arguments.model).state_dict(), weights)
    return FinetuneConfig(
        arguments.model,
        "fashion",
        method=method,
        weights=weights,
        size=arguments.size,
        batch_size=arguments.batch_size,
        per_class=arguments.per_class,
        validation_per_class=10,
        epochs=arguments.rounds + 1,
        schedule="constant",
        precision=arguments.precision,
        compile=arguments.compile,
        augment=arguments.augment,
        threads=arguments.threads,
        output=f"{folder}/runs",
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line says, and print it."""
    parser = common.parser(__doc__, rounds=9)
    parser.add_argument("--model", default="lite0", help="lite0, or a timm name (default: %(default)s)")
    parser.add_argument("--size", type=int, default=48, help="of the images in pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a step (default: %(default)s)")
    parser.add_argument("--per-class", type=int, default=20, help="images of ten classes (default: %(default)s)")
    parser.add_argument("--precision", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the network in both")
    parser.add_argument("--augment", action="store_true", help="crop and flip at random in both")
    parser.add_argument("--methods", nargs="+", default=["none", "mars-pgm"], help="default: none mars-pgm")
    arguments = parser.parse_args(words)
    common.start(arguments)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            timings = measure(configured(arguments, method, folder), arguments.rounds)
            found = {name: speeds(timing, 10 * arguments.per_class) for name, timing in timings.items()}
            results |= {f"{method}, {name}": speed for name, speed in found.items()}
    title = f"{arguments.model}, {arguments.size} px, batches of {arguments.batch_size}, {arguments.threads} threads"
    print_speeds(title, results)
    common.record(arguments, results)


if __name__ == "__main__":
    main()
