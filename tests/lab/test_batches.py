import math
from itertools import chain

import pytest
import torch

from tethertune.lab.batches import augment, batches, normalise


def listed(*args, **options):
    return [batch.tolist() for batch in batches(*args, **options)]


@pytest.fixture
def picture():
    """(1, 3, 32, 32): two channels that grow across and down, so that a crop shows where it was taken."""
    ramp = torch.arange(32, dtype=torch.uint8) * 8
    return torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32, dtype=torch.uint8)])[
        None
    ]


def test_without_a_seed_the_order_is_kept():
    assert listed(range(7), 3) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_last_batch_that_is_not_full_can_be_dropped():
    assert listed(range(7), 3, drop_last=True) == [[0, 1, 2], [3, 4, 5]]
    assert listed(range(6), 3, drop_last=True) == [[0, 1, 2], [3, 4, 5]]
    assert listed(range(2), 3, drop_last=True) == []


def test_every_epoch_shows_every_image_once_in_another_order():
    epochs = [listed(range(50), 8, shuffle_seed=(0, epoch)) for epoch in range(3)]
    assert all(sorted(chain(*epoch)) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_seed_and_epoch_only():
    assert listed(range(50), 8, shuffle_seed=(3, 1)) == listed(range(50), 8, shuffle_seed=(3, 1))
    assert listed(range(50), 8, shuffle_seed=(3, 1)) != listed(range(50), 8, shuffle_seed=(1, 3))
    eights, fives = (listed(range(50), size, shuffle_seed=(3, 1)) for size in (8, 5))
    assert list(chain(*eights)) == list(chain(*fives))


@pytest.mark.parametrize("start", range(8))
def test_an_epoch_goes_on_where_it_was_interrupted(start):
    whole = listed(range(50), 8, shuffle_seed=(0, 0))
    assert listed(range(50), 8, shuffle_seed=(0, 0), start=start) == whole[start:]


def test_batches_are_indices():
    (batch,) = batches(range(4), 4, shuffle_seed=(0, 0))
    assert (batch.dtype, batch.shape) == (torch.int64, (4,))


def test_augmentation_depends_on_seed_epoch_and_index_only(picture):
    indices = torch.arange(16)
    whole = augment(picture.expand(16, -1, -1, -1), 0, 0, indices)
    chosen = torch.tensor([11, 3])
    assert torch.equal(augment(picture.expand(2, -1, -1, -1), 0, 0, chosen), whole[chosen])
    assert whole.unique(dim=0).shape == whole.shape
    for seed, epoch in ((1, 0), (0, 1)):
        assert not torch.equal(augment(picture.expand(16, -1, -1, -1), seed, epoch, indices), whole)


def test_augmentation_gives_float32_of_the_same_range(picture):
    result = augment(picture.expand(64, -1, -1, -1), 0, 0, torch.arange(64))
    assert (result.dtype, result.shape) == (torch.float32, (64, 3, 32, 32))
    assert result.min() >= 0
    assert result.max() <= 255


def test_crops_stay_inside_keep_their_share_and_half_are_mirrored(picture):
    result = augment(picture.expand(1000, -1, -1, -1), 0, 0, torch.arange(1000))
    # a ramp of 8 a pixel, read at the inner pixels 8 and 24, tells the width and height of the crop
    across = (result[:, 0, 16, 24] - result[:, 0, 16, 8]) / (8 * 16)
    down = (result[:, 1, 24, 16] - result[:, 1, 8, 16]) / (8 * 16)
    area, ratio = (across * down).abs(), (across / down).abs()
    assert 0.3 < area.min() < 0.4
    assert 0.95 < area.max() < 1.01
    assert abs(area.mean() - 0.67) < 0.03
    assert ratio.max() < 4 / 3 + 0.01
    assert ratio.min() > 3 / 4 - 0.01
    assert 0.45 < (across < 0).float().mean() < 0.55
    assert (down > 0).all()
    # uniform places: the centres of small crops spread over the room that they have
    middle = result[area < 0.45][:, 0, 16, 16]
    assert middle.min() < 8 * 12
    assert middle.max() > 8 * 19


def test_normalise_is_the_networks_own_scaling():
    batch = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    result = normalise(batch, (0.5, 0.1, 0.0), (0.5, 0.1, 2.0))
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx([-1.0, 1.0, 0.5])


def test_normalise_takes_tensors_and_keeps_the_memory_layout():
    batch = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    result = normalise(batch, mean, std)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, normalise(batch, mean.tolist(), std.tolist()))
    assert math.isclose(result[1, 2, 3, 1].item(), (batch[1, 2, 3, 1].item() / 255 - 0.406) / 0.225, abs_tol=1e-6)
