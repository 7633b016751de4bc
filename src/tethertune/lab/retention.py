"""What was forgotten: how many of its own answers a network still gives after it was fine-tuned.

Fine-tuning throws the original classifier away. Put back on the fine-tuned body, it tells what the body still knows of
the source task, on any images like those of that task: no labels are needed, because the pre-trained network's own
confident answers are what must stay. It says nothing about whether these answers were right, nor about what another
classifier could read from the body.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tethertune.errors import ConfigurationError, DataError, NonFiniteWeightError
from tethertune.lab import cache as image_cache
from tethertune.lab import checkpoints, models, sources
from tethertune.lab.architectures import Preprocessing
from tethertune.lab.batches import normalise
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.data import Split
from tethertune.lab.models import LoadedModel

__all__ = ["CONFIDENT", "Kept", "Retention"]

CONFIDENT = 0.3
"""An answer counts from this probability of its class on."""

_BATCH = 64
"""Images in one forward pass."""


@dataclass(frozen=True)
class Kept:
    r"""What a fine-tuned network has kept of its pre-trained answers.

    Attributes:
        share: The share of the confident images whose most probable class is still the same.
        cross_entropy: The mean over the confident images of :math:`-\sum_c p_0(c) \log p(c)`, where :math:`p_0` are
            the pre-trained network's probabilities and :math:`p` the fine-tuned body's under the same classifier. Even
            if nothing was forgotten it is not 0, but the mean entropy of :math:`p_0`.
        confident: Images that the pre-trained network answered with a probability above :data:`CONFIDENT`.
        images: All images.
    """

    share: float
    cross_entropy: float
    confident: int
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Answers:
    """What the pre-trained network answers to the images of one batch.

    Attributes:
        images: (b,) int64, which images the batch holds.
        confident: (b,) bool, where it is confident.
        classes: (c,) int64, the most probable class of each confident image.
        probabilities: (c, classes) float64.
    """

    images: Tensor
    confident: Tensor
    classes: Tensor
    probabilities: Tensor


class Retention:
    """Measures fine-tuned networks against the pre-trained one, whose answers are computed once, in float32.

    Args:
        network: The pre-trained network with its original classifier, in eval mode.
        wanted: How it wants its images, and their size.
        head: Name of the classifier.
        folder: Images, in folders of any names; their labels, if they have any, are not used.
        cache: Folder of decoded images; see :func:`tethertune.lab.data.load`.
        device: Where to compute.
        layout: Memory format of images and convolutions.

    Attributes:
        fingerprint: ``"sha256:..."`` of the names and contents of the images.
        images: Their number.
        confident: Of how many the pre-trained network is confident.

    Raises:
        DataError: The folder or an image cannot be used, or the network is confident of no image.
    """

    def __init__(
        self,
        network: nn.Module,
        wanted: Preprocessing,
        head: str,
        folder: str | Path,
        *,
        cache: str | Path | None = None,
        device: torch.device | str = "cpu",
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._network = network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self._wanted, self._head, self._layout, self._device = wanted, head, layout, torch.device(device)
        self._split, self.fingerprint = _decoded(Path(folder), wanted, cache)
        self.images = len(self._split)
        self._before = [self._answers(batch) for batch in torch.split(torch.arange(self.images), _BATCH)]
        self.confident = sum(len(answers.classes) for answers in self._before)
        if not self.confident:
            raise DataError(
                f"{folder}: of none of its {self.images} images the pre-trained network is confident (p >"
                f" {CONFIDENT}): give images like those it was trained on."
            )

    @classmethod
    def of(cls, config: FinetuneConfig, loaded: LoadedModel, device: torch.device) -> "Retention | None":
        """What measures the runs of a configuration; ``None`` if it names no images to retain.

        Args:
            config: The configuration.
            loaded: The network that it fine-tunes.
            device: Where to compute.

        Raises:
            ConfigurationError: The network's weights do not fit images of that size.
            CheckpointError: The pre-trained weights come without their classifier.
            DataError: See :class:`Retention`.
        """
        if config.retain is None:
            return None
        network, wanted = models.original(config.model, size=config.retain_size, weights=config.weights)
        body, own = (_body(model, loaded.head) for model in (loaded.model, network))
        if fault := checkpoints.difference(body, own):
            raise ConfigurationError(
                f"{loaded.name} fine-tuned at {loaded.size} pixels takes no images of {wanted.size} pixels ({fault}):"
                f" give --retain-size {loaded.size}."
            )
        return cls(
            network,
            wanted,
            loaded.head,
            config.retain,
            cache=config.cache,
            device=device,
            layout=torch.channels_last if config.channels_last else torch.contiguous_format,
        )

    def measure(self, network: nn.Module) -> Kept:
        """What a network has kept.

        Args:
            network: The fine-tuned network, with any head; only its body is looked at.

        Raises:
            NonFiniteWeightError: It answers with what is no number.
        """
        kept, entropy = 0, 0.0
        for same, cross_entropy in self._compared(network):
            kept += int(same.sum())
            entropy += float(cross_entropy.sum())
        if not math.isfinite(entropy):
            raise NonFiniteWeightError(
                "The fine-tuned network's answers on the images to retain are no numbers: the training diverged. Lower"
                " --lr, or hold the weights with --method mars-pgm."
            )
        return Kept(kept / self.confident, entropy / self.confident, self.confident, self.images)

    def keeps(self, network: nn.Module, share: float) -> bool:
        """Whether a network has kept a share of the answers or more; looks at no more images than it must."""
        kept = self.confident
        for same, _ in self._compared(network):
            kept -= int((~same).sum())
            if kept / self.confident < share:
                return False
        return True

    @torch.no_grad()
    def _compared(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the confident images of each batch: whether the answer is the same, and the cross-entropy to it."""
        body = _body(network, self._head)
        for name, tensor in _body(self._network, self._head).items():
            tensor.copy_(body[name])
        for before in filter(lambda answers: len(answers.classes), self._before):
            logits = self._logits(before.images)[before.confident]
            yield logits.argmax(dim=1) == before.classes, -(before.probabilities * logits.log_softmax(dim=1)).sum(dim=1)

    @torch.no_grad()
    def _answers(self, images: Tensor) -> _Answers:
        logits = self._logits(images)
        probabilities = logits.softmax(dim=1)
        confident = probabilities.max(dim=1).values > CONFIDENT
        return _Answers(images, confident, logits[confident].argmax(dim=1), probabilities[confident])

    def _logits(self, indices: Tensor) -> Tensor:
        """(b, classes) float64 on the CPU."""
        images = self._split.batch(indices).to(self._device)
        images = normalise(images, self._wanted.mean, self._wanted.std).contiguous(memory_format=self._layout)
        logits: Tensor = self._network(images)
        return logits.cpu().double()


def _decoded(folder: Path, wanted: Preprocessing, cache: str | Path | None) -> tuple[Split, str]:
    """The images of a folder as the network wants them, and the fingerprint of their files."""
    source = sources.unlabelled(folder)
    place = Path(cache) if cache else image_cache.default_folder()
    fingerprint = image_cache.fingerprint(source, place)
    store = image_cache.decoded(
        source,
        fingerprint,
        size=wanted.size,
        interpolation=wanted.interpolation,
        crop_fraction=wanted.crop,
        cache=place,
    )
    return Split(store, torch.arange(len(store)).numpy(), source.labels), fingerprint


def _body(network: nn.Module, head: str) -> dict[str, Tensor]:
    """All parameters and buffers but the head's."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(f"{head}.")}
