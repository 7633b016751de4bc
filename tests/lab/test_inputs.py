from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tethertune.lab import inputs, sources
from tethertune.lab.images import fit

torch.set_num_threads(1)


@pytest.fixture
def taken(tiny):
    """``taken(**values)`` is the network and the data set of a tiny run."""

    def take(**values):
        config = tiny(**values)
        loaded = inputs.network(config, classes=3)
        return loaded, inputs.dataset(config, loaded)

    return take


def pixels(split):
    return split.batch(torch.arange(len(split)))


def test_images_come_in_the_size_of_the_network(taken):
    for size in (32, 40):
        loaded, data = taken(size=size)
        assert loaded.size == size
        for split in (data.train, data.validation, data.test):
            assert pixels(split).shape[1:] == (3, size, size)
            assert loaded.model(pixels(split)[:2].float()).shape == (2, 3)


def test_raw_values_reach_the_network_as_they_are_and_others_normalised(taken):
    def reaching(loaded, data):
        mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
        return (pixels(data.train) / 255 - mean) / std

    loaded, data = taken(scaling="raw")
    torch.testing.assert_close(reaching(loaded, data), pixels(data.train).float(), rtol=1e-6, atol=1e-4)
    assert reaching(*taken()).abs().max() < 5


def test_the_networks_own_interpolation_is_used_unless_another_is_named(taken):
    own, same = taken(), taken(interpolation="bicubic")
    assert own[0].interpolation == "bicubic"
    assert torch.equal(pixels(own[1].train), pixels(same[1].train))
    loaded, other = taken(interpolation="nearest")
    assert loaded.interpolation == "nearest"
    assert not torch.equal(pixels(own[1].train), pixels(other.train))


def test_the_seed_decides_the_new_head_and_the_weights_do_not_depend_on_it(taken):
    states = [taken(head="flatten", seed=seed)[0].model.state_dict() for seed in (1, 1, 2)]
    apart = [{key for key in states[0] if not torch.equal(states[0][key], other[key])} for other in states[1:]]
    assert apart == [set(), {"classifier.weight"}]


def test_weights_are_those_of_the_file(taken, tiny_inputs, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_inputs / "base.safetensors")
    save_file({key: tensor + 1 for key, tensor in state.items()}, tmp_path / "more.safetensors")
    loaded, _ = taken(weights=str(tmp_path / "more.safetensors"))
    assert loaded.source == str(tmp_path / "more.safetensors")
    assert torch.equal(loaded.model.conv_stem.weight, state["conv_stem.weight"] + 1)


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({}, (21, 9, 9)),
        ({"per_class": 2}, (6, 9, 9)),
        ({"validation_per_class": 2}, (21, 6, 9)),
        ({"test_per_class": 1}, (21, 9, 3)),
        ({"train_on": "train+validation"}, (30, 9, 9)),
    ],
)
def test_each_split_is_as_large_as_the_configuration_says(taken, values, sizes):
    _, data = taken(**values)
    assert tuple(data.sizes.values()) == sizes
    for split in (data.train, data.validation, data.test):
        assert len(set(Counter(split.labels.tolist()).values())) == 1


def test_the_seed_decides_which_images_are_kept_and_which_labels_are_wrong(taken):
    def chosen(seed):
        _, data = taken(per_class=4, label_noise=0.5, seed=seed)
        true = data.train.members // 7  # seven training images a class, in the order of the classes
        return data.train.members.tolist(), (data.train.labels != true).tolist(), data.validation.labels.tolist()

    first, again, other = chosen(1), chosen(1), chosen(2)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert sum(first[1]) == 6
    assert first[2] == other[2] == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_photos_are_cut_as_the_network_wants_them_or_stretched(tiny, tmp_path, make_images, resize):
    root = make_images(tmp_path / "wide", {f"{split}/{name}": 1 for split in ("train", "val", "test") for name in "ab"})
    config = tiny(data=str(root), resize=resize, cache=str(tmp_path / "cache"))
    loaded = inputs.network(config, classes=2)
    assert 0.875 < loaded.crop < 1
    found = pixels(inputs.dataset(config, loaded).train).permute(0, 2, 3, 1).numpy()
    for name, image in zip("ab", found, strict=True):
        with Image.open(root / "train" / name / "00.png") as photo:
            wanted = fit(photo, 32, Image.Resampling.BICUBIC, loaded.crop if resize == "crop" else None)
        assert np.array_equal(image, wanted)
    assert any((tmp_path / "cache").iterdir())


def test_a_source_that_was_found_before_is_not_looked_for_again(tiny, tiny_inputs):
    source = sources.find(str(tiny_inputs / "colours"))
    config = tiny(data="nowhere/at/all")
    data = inputs.dataset(config, inputs.network(config, classes=3), source)
    assert data.name == "colours"
    assert data.sizes == {"train": 21, "validation": 9, "test": 9}
