"""From a split to what the network sees: the order of images, their augmentation, their normalisation.

Everything random is a pure function of seed, epoch and image, so a run that resumes goes on exactly as it would have.
Pixels stay uint8 until they are on the device.
"""

import math
from collections.abc import Iterator, Sequence, Sized

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tethertune.lab.randomness import generator

__all__ = ["augment", "batches", "normalise"]

_AREA = (0.35, 1.0)
"""Share of the image that a random crop keeps: milder than the usual 0.08, which suits training from scratch."""
_RATIO = 4 / 3
"""Largest ratio of a random crop's longer to its shorter side."""


def batches(
    split: Sized,
    batch_size: int,
    *,
    shuffle_seed: tuple[int, int] | None = None,
    start: int = 0,
    drop_last: bool = False,
) -> Iterator[Tensor]:
    """Indices of the images of each batch of one epoch, (b,) int64.

    Args:
        split: What is indexed; only its length counts.
        batch_size: Images in a batch; the last batch has what is left.
        shuffle_seed: (seed, epoch) of a random order, or None for the order of the split.
        start: Number of batches to leave out at the beginning, because they were trained on before an interruption.
        drop_last: Leave out a last batch that is not full.
    """
    count = len(split)
    order = np.arange(count) if shuffle_seed is None else generator("shuffle", *shuffle_seed).permutation(count)
    end = count - count % batch_size if drop_last else count
    for first in range(start * batch_size, end, batch_size):
        yield torch.from_numpy(order[first : first + batch_size])


def augment(batch: Tensor, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """A random resized crop of each image, every other one mirrored.

    Args:
        batch: (b, 3, height, width) uint8 on any device.
        seed: With epoch and index, decides the crop of an image, whatever else is in the batch.
        epoch: As in :func:`batches`.
        indices: (b,) int64, the images' places in their split.

    Returns:
        (b, 3, height, width) float32, still from 0 to 255, on the same device.
    """
    crops = _crops(seed, epoch, indices).to(batch.device)
    grid = functional.affine_grid(crops, list(batch.shape), align_corners=False)
    return functional.grid_sample(batch.to(torch.float32), grid, padding_mode="border", align_corners=False)


def normalise(batch: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """``(batch / 255 - mean) / std`` for each channel, float32, in the batch's memory layout and on its device."""
    centre, spread = (
        torch.as_tensor(values, dtype=torch.float32, device=batch.device).reshape(1, -1, 1, 1) for values in (mean, std)
    )
    return (batch.to(torch.float32) / 255 - centre) / spread


def _crops(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Affine maps (b, 2, 3) from the output to the input, both in coordinates from -1 to 1."""
    draws = np.array([generator("augment", seed, epoch, index).random(5) for index in indices.tolist()])
    area, ratio, across, down, mirrored = torch.from_numpy(draws.astype(np.float32)).unbind(1)
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * area
    ratio = torch.exp((2 * ratio - 1) * math.log(_RATIO))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    crops = torch.zeros(len(indices), 2, 3)
    crops[:, 0, 0] = torch.where(mirrored < 0.5, -width, width)
    crops[:, 0, 2] = (1 - width) * (2 * across - 1)
    crops[:, 1, 1] = height
    crops[:, 1, 2] = (1 - height) * (2 * down - 1)
    return crops
