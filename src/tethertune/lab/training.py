"""The main job: fine-tune a network, and leave a run folder.

The result is a pure function of the configuration: the order of the images, their augmentation and all other
randomness are derived from the seed and the place in the run (epoch, step, image), never from what a generator was
used for before. So a run that was killed goes on from its last saved state as if nothing had happened.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from tethertune import measure
from tethertune.errors import ConfigurationError, NonFiniteWeightError, RunError
from tethertune.lab import card, data, inputs, machine, models, optimisers, record, regularisers, sources
from tethertune.lab.attention import MOST_IMAGES
from tethertune.lab.batches import augment, batches, normalise
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.display import Display
from tethertune.lab.gradients import gradient_norms
from tethertune.lab.retention import Kept, Retention
from tethertune.lab.runs import Run, RunFolder, load
from tethertune.lab.whole_batch import WholeBatch
from tethertune.lab.wiseft import Line, largest, weights_of
from tethertune.reference import Reference

__all__ = ["Training", "finetune", "rebuilt"]

_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_EVALUATION_BATCH = 64
"""Images in one forward pass of an evaluation, at least."""
_SUMS = ("loss", "correct", "penalty", "gradient_norm")


def finetune(
    config: FinetuneConfig,
    *,
    fresh: bool = False,
    quiet: bool = False,
    part: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
) -> Run:
    """Fine-tune a network as configured; resume the run if it was begun, and skip it if it is complete.

    Under ``torchrun`` every process calls this; each takes a share of every batch, and the first one writes.

    Args:
        config: The run.
        fresh: Delete what an earlier run of this configuration left, and start anew.
        quiet: Show no progress.
        part: What the run is a part of, kept as ``part`` in ``run.json``; a run without is a result by itself. One of
            kind ``"trial"``, which only serves to choose a setting, is not tested and leaves no weights.
        on_epoch: Called with each line of metrics; what it raises ends the run, which can be resumed.

    Returns:
        The complete run.

    Raises:
        ConfigurationError: A value that only the model, the data or the machine can refuse.
        CheckpointError: The pre-trained weights cannot be read.
        DataError: The images cannot be used.
        RunError: The run folder is in use, is of another configuration, or cannot be written.
        NonFiniteWeightError: The training diverged, now or when the same run was made before.
    """
    folder = RunFolder(config)
    if not fresh and folder.status() == "diverged":
        raise NonFiniteWeightError(load(folder.path).info["diverged"])
    if fresh or folder.status() != "complete":
        with _reproducible(config.threads):
            training = Training(config, _accelerator(config.precision), part, on_epoch)
            training.run(folder, fresh=fresh, quiet=quiet)
    elif folder.has_leftovers():  # it was killed after its last file, before tidying up
        with suppress(RunError), folder.own():
            folder.drop_states()
    return load(folder.path)


@contextmanager
def rebuilt(run: Run, **changes: Any) -> Iterator["Training"]:
    """A complete run in memory again, as it was before its first step: to measure what is made of its weights.

    Args:
        run: The run.
        changes: Values of its configuration that are to be others; not such as change the images or the network.

    Raises:
        ConfigurationError: A change that is not allowed.
        CheckpointError: The pre-trained weights cannot be read.
        DataError: The images cannot be used.
        RunError: The run is not complete, or images or pre-trained weights are no longer those of the run.
    """
    if not run.complete:
        raise RunError(f"{run.path} is not complete: give the command of the run again, it resumes.")
    config = replace(run.config, **changes)
    with _reproducible(config.threads):
        training = Training(config, _accelerator(config.precision))
        training.require_inputs_of(run)
        yield training


@dataclass
class Progress:
    """How far a run is: what must be saved to go on, besides weights, optimiser and sums.

    Attributes:
        epoch: Epochs done.
        step: Optimiser steps done.
        seconds: Wall time so far, summed over the parts of a resumed run.
        epoch_began: What ``seconds`` was when the current epoch began.
        peak_memory: In bytes.
        metrics: The lines of ``metrics.jsonl``.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    epoch_began: float = 0.0
    peak_memory: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)


class Training:
    """One run in memory. Building it finds everything that can be wrong, and writes nothing.

    Args:
        config: The run.
        accelerator: The device, the precision and the processes.
        part: What the run is a part of; see :func:`finetune`.
        on_epoch: Called with each line of metrics.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        accelerator: Accelerator,
        part: Mapping[str, Any] | None = None,
        on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.part = None if part is None else dict(part)
        self.on_epoch = on_epoch
        if accelerator.device.type == "cpu":
            machine.keep_memory()
        self.loaded, self.dataset = _inputs(config)
        self.network: nn.Module = self.loaded.model.to(accelerator.device)
        if config.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.reference = Reference.of(self.network)
        self.regulariser = regularisers.build(config, self.loaded, self.reference)
        self.retention = Retention.of(config, self.loaded, accelerator.device) if accelerator.is_main_process else None
        self.line = None if config.keep is None else self.line_from_here()
        self.optimizer = optimisers.build(config, _groups(config, self.network, self.loaded.head))
        self.regulariser.attach(self.optimizer)
        for parameter in self.regulariser.frozen():  # after the optimiser, which keeps them, has been made
            parameter.requires_grad = False
        self.optimizer.register_step_pre_hook(self._measure_gradient)  # after the penalty's hook, to count it in
        self.shares_statistics = config.bn == "train" and accelerator.num_processes > 1
        if self.shares_statistics and config.compile:
            raise ConfigurationError("--bn train on several processes cannot be compiled: leave --compile out.")
        if config.compile:
            torch.compiler.reset()  # code of an earlier run would be taken over without the hooks of this one
            self.network.compile()
        self.model, self.stepper = accelerator.prepare(self.network, self.optimizer)
        self.progress = Progress()
        self.started = time.monotonic()
        self.mean, self.std = (torch.tensor(v, device=accelerator.device) for v in (self.loaded.mean, self.loaded.std))
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = {name: torch.zeros((), dtype=dtype, device=accelerator.device) for name in _SUMS}

    def run(self, folder: RunFolder, *, fresh: bool, quiet: bool) -> None:
        """Train from the last saved state, or from the beginning, to the end."""
        writes = self.accelerator.is_main_process
        folder.require_space(self._bytes_needed())
        with folder.own(fresh=fresh) if writes else nullcontext():
            self.accelerator.wait_for_everyone()
            if folder.status() == "complete":  # by another process, while this one was preparing
                return
            if folder.status() == "running":
                self.require_inputs_of(load(folder.path))
            if writes:
                folder.write_info(self._info("running"))
            self.regulariser.prepare(folder.states if writes else None, self._examples)
            self._resume(folder)
            steps = self.config.epochs * self.steps_per_epoch
            title = f"{self.config.method} seed {self.config.seed}"
            with Display(title, steps, done=self.progress.step, quiet=quiet or not writes) as display:
                try:
                    while self.progress.epoch < self.config.epochs:
                        self._epoch(folder, display)
                except NonFiniteWeightError as error:
                    if writes:
                        folder.write_info(self._info("diverged") | {"diverged": str(error)})
                        folder.drop_states()
                    raise
            self._finish(folder)
            self.accelerator.wait_for_everyone()  # so that every process finds the complete run

    # ------------------------------------------------------------------------------------------------- training

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last one may see fewer images."""
        return math.ceil(self.images_per_epoch / (self.config.batch_size * self.config.accumulate))

    @property
    def images_per_epoch(self) -> int:
        """Training images that an epoch passes: all, but for those of a last batch that is dropped."""
        images, step = len(self.dataset.train), self.config.batch_size * self.config.accumulate
        return images - images % step if self.config.drop_last else images

    def _epoch(self, folder: RunFolder, display: Display) -> None:
        """The steps of the current epoch that are still to be done, then its line of metrics."""
        progress = self.progress
        self._train_mode()
        steps = batches(
            self.dataset.train,
            self.config.batch_size * self.config.accumulate,
            shuffle_seed=(self.config.seed, progress.epoch),
            start=progress.step - progress.epoch * self.steps_per_epoch,
            drop_last=self.config.drop_last,
        )
        for indices in steps:
            self._step(indices)
            progress.step += 1
            display.step(progress.step, self._figures)
            self._save_when_due(folder)
        line = self._line()
        progress.metrics.append(line)
        progress.epoch += 1
        progress.epoch_began = self._seconds()
        for total in self.sums.values():
            total.zero_()
        if self.accelerator.is_main_process:
            folder.write_metrics(progress.metrics)
        display.epoch(line, self.config.epochs)
        self._save_when_due(folder, epoch_ended=True)
        if self.on_epoch is not None:
            self.on_epoch(line)
            progress.epoch_began = self._seconds()  # nothing was trained while that was called

    def _train_mode(self) -> None:
        self.model.train()
        if self.config.bn == "frozen":
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _step(self, indices: Tensor) -> None:
        """One optimiser step on the given training images."""
        for group, lr in zip(self.optimizer.param_groups, self._learning_rates(), strict=True):
            group["lr"] = lr
        _seed(self.config.seed, self.progress.step, self.accelerator.process_index)
        *others, last = torch.split(indices, self.config.batch_size)
        for batch in others:
            with self.accelerator.no_sync(self.model):
                self._add_gradient(batch, len(indices))
        self._add_gradient(last, len(indices))
        self.accelerator.unscale_gradients(self.stepper)
        self.stepper.step()
        self.stepper.zero_grad()

    def _add_gradient(self, batch: Tensor, total: int) -> None:
        """Add the gradient of this process's share of a batch of a step on ``total`` images.

        Gradients are averaged over the processes, so each share counts ``processes * share / total``. A process whose
        share is empty takes part with an image that counts nothing.
        """
        share = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        count = len(share)
        images, labels = self._load(self.dataset.train, share if count else batch[:1], augmented=self.config.augment)
        with WholeBatch(counts=count > 0) if self.shares_statistics else nullcontext():
            logits = self.model(images)
        loss = cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        with self.accelerator.autocast():
            penalty = self.regulariser.loss(images)
        weight = count * self.accelerator.num_processes / total
        self.accelerator.backward(weight * (loss if penalty is None else loss + penalty))
        self.sums["loss"] += count * loss.detach()
        self.sums["correct"] += (logits.argmax(dim=1) == labels).sum() * (count > 0)
        if penalty is not None:
            self.sums["penalty"] += count * penalty.detach()

    def _measure_gradient(self, optimizer: Optimizer, *_: object) -> None:
        """Add the norm of the whole gradient to its sum; a step that is skipped for an overflow counts as 0."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.sums["gradient_norm"] += torch.nn.utils.get_total_norm(gradients).nan_to_num(posinf=0.0)

    def _learning_rates(self) -> list[float]:
        steps = self.config.epochs * self.steps_per_epoch
        factor = optimisers.lr_factor(self.config.schedule, self.progress.step, steps)
        return [factor * group["initial_lr"] for group in self.optimizer.param_groups]

    def _load(self, split: data.Split, indices: Tensor, *, augmented: bool = False) -> tuple[Tensor, Tensor]:
        """Normalised images (b, 3, size, size) float32 and labels (b,) int64 of a split, on the device."""
        images = self._to_device(split.batch(indices))
        labels = self._to_device(torch.from_numpy(split.labels[indices.numpy()]))
        if augmented:
            images = augment(images, self.config.seed, self.progress.epoch, indices)
        images = normalise(images, self.mean, self.std)
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout), labels

    def _examples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images in a random order, as many as show which channels matter."""
        order = batches(self.dataset.train, _EVALUATION_BATCH, shuffle_seed=(self.config.seed, 0))
        for indices in islice(order, MOST_IMAGES // _EVALUATION_BATCH):
            yield self._load(self.dataset.train, indices)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy while the device computes, where it can."""
        if self.accelerator.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.accelerator.device, non_blocking=True)

    # ------------------------------------------------------------------------------------------------ measuring

    @torch.inference_mode()
    def evaluate(self, split: data.Split) -> tuple[float, float]:
        """Mean loss and accuracy on a split, shared among the processes."""
        self.network.eval()
        total = torch.zeros(2, dtype=self.sums["loss"].dtype, device=self.accelerator.device)
        seen = self._evaluated(split)
        for images, labels in self._share(split, seen):
            logits = self.network(images)
            total[0] += cross_entropy(logits, labels, reduction="sum")
            total[1] += (logits.argmax(dim=1) == labels).sum()
        loss, correct = self.accelerator.reduce(total).tolist()
        return loss / len(seen), correct / len(seen)

    def _evaluated(self, split: data.Split) -> Tensor:
        """The images of a split that an evaluation sees: all, or, as in the authors' code, those of full batches."""
        if not self.config.drop_last:
            return torch.arange(len(split))
        order = batches(split, self.config.batch_size, shuffle_seed=(self.config.seed, 0), drop_last=True)
        return torch.cat(list(order)).sort().values

    def _share(self, split: data.Split, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images and labels for an evaluation: this process's share of some images of a split."""
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        for batch in torch.split(mine, max(_EVALUATION_BATCH, self.config.batch_size)):
            yield self._load(split, batch)

    def _gradients(self) -> dict[str, float]:
        """The parts of the gradient over all training images."""
        return gradient_norms(
            self.network,
            self.regulariser,
            self._share(self.dataset.train, torch.arange(len(self.dataset.train))),
            len(self.dataset.train),
            label_smoothing=self.config.label_smoothing,
            reduce=self.accelerator.reduce,
        )

    def _line(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl`` of the epoch whose last step is done."""
        progress, config = self.progress, self.config
        means = self._means()  # waits for the device, so that the clock below is right
        self._require_finite({"loss": means["loss"]})
        training_seconds = self._seconds() - progress.epoch_began
        evaluates = progress.epoch + 1 == config.epochs or (progress.epoch + 1) % config.eval_every == 0
        validation_loss, validation_accuracy = self.evaluate(self.dataset.validation) if evaluates else (None, None)
        lr, head_lr = (group["lr"] for group in self.optimizer.param_groups)
        line = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": lr,
            "head_lr": head_lr,
            "loss": means["loss"],
            "penalty": means["penalty"] + self.regulariser.value(),
            "accuracy": means["correct"],
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "gradient_norm": means["gradient_norm"],
            **(self._of_figure_1() if evaluates and config.gradients else {}),
            **self._forgotten(evaluates),
            "seconds": self._seconds() - progress.epoch_began,
            "images_per_second": self.images_per_epoch / training_seconds,
            "at_radius": self.regulariser.at_radius(),
            "distance": _quantiles([moved.mars for moved in self._distances().values() if moved.role == "body"]),
        }
        self._require_finite(line | line["distance"])
        return line

    def _of_figure_1(self) -> dict[str, float]:
        """What the paper's Figure 1 draws besides: the gradient and, but in a trial, the accuracy on the test images.

        Nothing is chosen by the latter.
        """
        tested = {} if self._is_trial else {"test_accuracy": self.evaluate(self.dataset.test)[1]}
        return self._gradients() | tested

    def _require_finite(self, figures: Mapping[str, Any]) -> None:
        """Check figures of the epoch whose last step is done.

        Raises:
            NonFiniteWeightError: One of them is infinite or no number.
        """
        for name, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteWeightError(
                    f"The {name.replace('_', ' ')} of epoch {self.progress.epoch + 1} is {value}: the training"
                    f" diverged. Lower --lr ({self.config.lr}), or hold the weights with --method mars-pgm."
                )

    def line_from_here(self) -> Line:
        """The line from the weights that the network has now to whatever they will be."""
        return Line(self.network, head=self.loaded.head, constraint=self.regulariser.constraint)

    def _forgotten(self, evaluates: bool) -> dict[str, float | None]:
        """What the line of metrics says of the answers that are to be retained; nothing without any."""
        if self.retention is None:
            return {}
        kept = self.retention.measure(self.network) if evaluates else None
        return {
            "retention": None if kept is None else kept.share,
            "retention_cross_entropy": None if kept is None else kept.cross_entropy,
        }

    def _means(self) -> dict[str, float]:
        """The sums over the epoch and all processes by image; that of the gradient's norm, equal on all, by step."""
        totals = self.accelerator.reduce(torch.stack(list(self.sums.values()))).tolist()
        means = {name: total / self.images_per_epoch for name, total in zip(self.sums, totals, strict=True)}
        means["gradient_norm"] = self.sums["gradient_norm"].item() / self.steps_per_epoch
        return means

    def _figures(self) -> str:
        """What the progress bar shows in the middle of an epoch; waits for the device."""
        done = self.progress.step - self.progress.epoch * self.steps_per_epoch
        seen = min(done * self.config.batch_size * self.config.accumulate, self.images_per_epoch)
        mine = seen / self.accelerator.num_processes
        speed = seen / (self._seconds() - self.progress.epoch_began)
        loss, correct = torch.stack([self.sums["loss"], self.sums["correct"]]).tolist()
        parts = [f"loss {loss / mine:.4f}", f"accuracy {correct / mine:.1%}", f"{speed:.0f} images/s"]
        if self.progress.metrics and self.progress.metrics[-1]["at_radius"] is not None:
            parts.append(f"{self.progress.metrics[-1]['at_radius']:.0%} of rows at their radius")
        return ", ".join(parts)

    def _distances(self) -> dict[str, measure.Displacement]:
        return measure.distances(self.network, self.reference, head=self.loaded.head, convention=self.config.convention)

    def _seconds(self) -> float:
        """Wall time of the run so far."""
        return self.progress.seconds + time.monotonic() - self.started

    # ----------------------------------------------------------------------------------------- saving and ending

    def _save_when_due(self, folder: RunFolder, *, epoch_ended: bool = False) -> None:
        """Save the state when the last one is ``checkpoint_every`` seconds old.

        Several processes save at the ends of epochs only, where the first one holds all there is to save.
        """
        alone = self.accelerator.num_processes == 1
        due = time.monotonic() - self.started >= self.config.checkpoint_every
        if due and self.accelerator.is_main_process and (alone or epoch_ended):
            self._tick()
            folder.save_state(self._state(), self.progress.step)

    def _tick(self) -> None:
        """Bring the wall time and the peak memory of the progress up to now."""
        self.progress.seconds, self.started = self._seconds(), time.monotonic()
        self.progress.peak_memory = max(self.progress.peak_memory, machine.peak_memory(self.accelerator.device))

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "regulariser": self.regulariser.state_dict(),
            "progress": asdict(self.progress),
            "sums": self.sums,
        }

    def require_inputs_of(self, run: Run) -> None:
        """Check that a run which was begun has the images and pre-trained weights that it was begun with.

        Raises:
            RunError: They have changed.
        """
        things = [
            ("images", run.info["data"]["fingerprint"], self.dataset.fingerprint),
            ("pre-trained weights", run.info["model"]["weights_sha256"], self.loaded.weights_sha256),
        ]
        if self.retention is not None and run.config.retain == self.config.retain:
            things.append(("images to retain", run.info["retain"]["fingerprint"], self.retention.fingerprint))
        for thing, then, now in things:
            if then != now:
                raise RunError(
                    f"{run.path} was begun with other {thing} than there are now ({then}, now {now}): bring those back,"
                    " or start anew with --fresh."
                )

    def _resume(self, folder: RunFolder) -> None:
        """Take over the last saved state, if there is one. The reference stays the original pre-trained weights."""
        state = folder.load_state()
        if state is None:
            return
        self.regulariser.load_state_dict(state["regulariser"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.started = time.monotonic()
        for name, total in state["sums"].items():
            self.sums[name].copy_(total)

    def _bytes_needed(self) -> int:
        """Room for two saved states, the one and the next, of weights and three moments each; and the weights."""
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self.network.state_dict().values())
        return int(9 * weights)

    def _finish(self, folder: RunFolder) -> None:
        """Test, and write all that a complete run holds; ``run.json`` says so last."""
        figures, before = self._figures_at_end(), None
        alpha = self._go_back()
        if alpha < 1:
            figures, before = self._figures_anew(), figures
        if not self.accelerator.is_main_process:
            return
        self._tick()
        progress = self.progress
        training_seconds = sum(self.images_per_epoch / line["images_per_second"] for line in progress.metrics)
        info = self._info("complete")
        info["outcome"] = {
            **figures,
            "epochs": progress.epoch,
            "steps": progress.step,
            "seconds": progress.seconds,
            "images_per_second": progress.epoch * self.images_per_epoch / training_seconds,
            "peak_memory_bytes": progress.peak_memory,
            "alpha": alpha,
            "before_interpolation": before,
        }
        layers = record.layers(self._distances(), self.regulariser.constraint)
        folder.write_metrics(progress.metrics)
        folder.write_distances(layers)
        if not self._is_trial:
            metadata = record.metadata(self.config, self.loaded, self.dataset, alpha)
            folder.write_weights(self.network.state_dict(), metadata)
            folder.write_card(card.write(self.config, info, layers))
        folder.write_info(info)
        folder.drop_states()

    @property
    def _is_trial(self) -> bool:
        """Whether this is a trial of a search, which never looks at the test images."""
        return self.part is not None and self.part["kind"] == "trial"

    def _figures_at_end(self) -> dict[str, Any]:
        """What the outcome says of the network as the last epoch left it."""
        final = self.progress.metrics[-1]
        test_loss, test_accuracy = (None, None) if self._is_trial else self.evaluate(self.dataset.test)
        return {
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "validation_accuracy": final["validation_accuracy"],
            "validation_loss": final["validation_loss"],
            "train_accuracy": final["accuracy"],
            "at_radius": final["at_radius"],
            "retention": None if self.retention is None else self._kept_at_end(self.retention),
        }

    def _kept_at_end(self, retention: Retention) -> dict[str, Any]:
        """What was kept, as measured after the last epoch."""
        final = self.progress.metrics[-1]
        share, cross_entropy = final["retention"], final["retention_cross_entropy"]
        return Kept(share, cross_entropy, retention.confident, retention.images).to_dict()

    def _figures_anew(self) -> dict[str, Any]:
        """What the outcome says of the network after it has gone back towards the reference."""
        validation_loss, validation_accuracy = self.evaluate(self.dataset.validation)
        return self._figures_at_end() | {
            "validation_accuracy": validation_accuracy,
            "validation_loss": validation_loss,
            "train_accuracy": self.evaluate(self.dataset.train)[1],
            "at_radius": self.regulariser.at_radius(),
            "retention": None if self.retention is None else self.retention.measure(self.network).to_dict(),
        }

    def _go_back(self) -> float:
        """Go back towards the reference no farther than the answers to be kept ask for; gives the alpha."""
        line, retention, share = self.line, self.retention, self.config.keep
        if line is None:
            return 1.0
        trained = weights_of(self.network)

        def keeps(alpha: float) -> bool:
            assert retention is not None
            assert share is not None
            line.go(trained, alpha)
            return retention.keeps(self.network, share)

        found = [largest(keeps) if self.accelerator.is_main_process else 0.0]
        alpha = float(broadcast_object_list(found)[0])
        line.go(trained, alpha)
        return alpha

    def _info(self, status: str) -> dict[str, Any]:
        """``run.json``, without an outcome."""
        constraint, retention = self.regulariser.constraint, self.retention
        return {
            "schema": 1,
            "status": status,
            "part": self.part,
            **record.described(self.config, self.loaded, self.dataset),
            "machine": machine.describe(self.accelerator.device) | {"processes": self.accelerator.num_processes},
            "constraint": constraint and {"summary": constraint.summary(), "backend": constraint.backend},
            "retain": None if retention is None else {"fingerprint": retention.fingerprint},
            "outcome": None,
        }


def _inputs(config: FinetuneConfig) -> tuple[models.LoadedModel, data.Dataset]:
    """The model, with a head for the classes of the data; and the data, in the model's size."""
    source = sources.find(config.data)
    loaded = inputs.network(config, classes=len(source.classes))
    dataset = inputs.dataset(config, loaded, source)
    _require_batches(config, dataset)
    return loaded, dataset


def _require_batches(config: FinetuneConfig, dataset: data.Dataset) -> None:
    """Check that dropping partial batches leaves one in every split.

    Raises:
        ConfigurationError: It does not.
    """
    for split, images in dataset.sizes.items():
        batch = config.batch_size * (config.accumulate if split == "train" else 1)
        if config.drop_last and images < batch:
            raise ConfigurationError(
                f"--drop-last leaves nothing of the {images} {split} images, fewer than a batch of {batch}: lower"
                " --batch-size, or leave --drop-last out."
            )


def _groups(config: FinetuneConfig, network: nn.Module, head: str) -> list[dict[str, Any]]:
    """The trained parameters of the body and of the head, each with its learning rate."""
    of_head = {id(parameter) for parameter in network.get_submodule(head).parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rates = (config.lr, config.lr if config.head_lr is None else config.head_lr)
    return [
        {"params": [p for p in trained if (id(p) in of_head) == is_head], "lr": lr, "initial_lr": lr}
        for is_head, lr in zip((False, True), rates, strict=True)
    ]


def _accelerator(precision: str) -> Accelerator:
    """Accelerate's view of the device and the processes.

    Raises:
        ConfigurationError: The device cannot compute in that precision.
    """
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process would be kept
    try:
        # Without cpu=True, Accelerate takes processes without an accelerator for separate runs.
        accelerator = Accelerator(mixed_precision=_PRECISIONS[precision], cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise ConfigurationError(f"--precision {precision} cannot be used here: {error}") from error
    if precision == "float16" and accelerator.device.type == "cpu":
        raise ConfigurationError(
            "--precision float16 needs an accelerator, and there is none: use bfloat16 or float32."
        )
    return accelerator


@contextmanager
def _reproducible(threads: int | None) -> Iterator[None]:
    """Deterministic algorithms and the given number of CPU threads inside; the caller's settings after it.

    An operation that has no deterministic implementation on the device warns, and runs all the same.
    """
    deterministic: Any = torch.utils.deterministic
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        deterministic.fill_uninitialized_memory = before[3]


def _seed(seed: int, step: int, process: int) -> None:
    """Seed torch for one step on one process, so that dropout does not depend on what ran before.

    It is all that differs between processes: a network with dropout draws other masks on several than on one.
    """
    digest = hashlib.sha256(f"{seed} {step} {process}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest, the quartiles and the largest, of float64 values."""
    names = ("min", "q25", "median", "q75", "max")
    levels = torch.linspace(0, 1, 5, dtype=torch.float64)
    return dict(zip(names, torch.tensor(values, dtype=torch.float64).quantile(levels).tolist(), strict=True))
