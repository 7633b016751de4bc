import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tethertune.errors import CheckpointError, ConfigurationError, DataError, NonFiniteWeightError
from tethertune.lab import models, training
from tethertune.lab.retention import CONFIDENT, Kept, Retention

CPU = torch.device("cpu")
STAMPS = Path("/usr/share/tuxpaint/stamps")


def load(config):
    """The network that a configuration fine-tunes."""
    return models.load(
        config.model, classes=3, size=config.size, head=config.head, weights=config.weights, seed=config.seed
    )


def forget(loaded, by=0.02):
    """Move the body, as fine-tuning does."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, tensor in loaded.model.state_dict().items():
            if not name.startswith(loaded.head) and tensor.is_floating_point():
                tensor.mul_(1 + by * torch.randn_like(tensor))
    return loaded.model


def measured(config, change=lambda loaded: loaded.model):
    loaded = load(config)
    retention = Retention.of(config, loaded, CPU)
    return retention.measure(change(loaded))


def answers(config, body=None):
    """Each image's probabilities from timm's own network, in float64."""
    network = timm.create_model("test_efficientnet", num_classes=10).eval()
    state = load_file(config.weights)
    own = {} if body is None else {name: tensor for name, tensor in body.items() if not name.startswith("classifier.")}
    network.load_state_dict(state | own)
    retention = Retention.of(config, load(config), CPU)
    pixels = retention._split.batch(torch.arange(70)).float() / 255
    wanted = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(wanted[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return network((pixels - mean) / std).double().softmax(dim=1)


def test_the_pretrained_network_keeps_all_and_its_cross_entropy_is_its_entropy(retaining):
    config = retaining()
    kept = measured(config)
    before = answers(config)
    confident = before.max(dim=1).values > CONFIDENT

    assert (kept.share, kept.images, kept.confident) == (1.0, 70, int(confident.sum()))
    assert 10 < kept.confident < 70
    entropy = -(before * before.log()).sum(dim=1)[confident].mean().item()
    assert kept.cross_entropy == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"head": "flatten"}, {"channels_last": False}, {"scaling": "raw"}])
def test_what_is_kept_is_what_the_definition_says(retaining, options):
    config = retaining(**options)
    kept = measured(config, forget)
    before, after = answers(config), answers(config, forget(load(config)).state_dict())
    confident = before.max(dim=1).values > CONFIDENT
    same = (before.argmax(dim=1) == after.argmax(dim=1))[confident]

    assert 0 < kept.share < 1
    assert kept.share == same.double().mean().item()
    assert kept.cross_entropy == pytest.approx(-(before * after.log()).sum(dim=1)[confident].mean().item(), rel=1e-4)
    assert kept.to_dict() == {
        "share": kept.share,
        "cross_entropy": kept.cross_entropy,
        "confident": kept.confident,
        "images": 70,
    }


def test_a_share_is_kept_or_not_as_measured(retaining):
    config = retaining()
    loaded = load(config)
    retention = Retention.of(config, loaded, CPU)
    model = forget(loaded)
    share = retention.measure(model).share

    assert retention.keeps(model, share)
    assert not retention.keeps(model, math.nextafter(share, 2))
    assert retention.keeps(model, 0.0)


def test_a_share_that_is_lost_early_takes_no_more_images(retaining, monkeypatch):
    config = retaining()
    loaded = load(config)
    retention = Retention.of(config, loaded, CPU)
    seen = []
    logits = retention._logits
    monkeypatch.setattr(retention, "_logits", lambda indices: seen.append(len(indices)) or logits(indices))
    model = forget(loaded, by=0.5)

    assert not retention.keeps(model, 1.0)
    assert seen == [64]


def test_measuring_changes_neither_the_network_nor_what_it_is_measured_by(retaining):
    config = retaining()
    loaded = load(config)
    retention = Retention.of(config, loaded, CPU)
    model = forget(loaded)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = retention.measure(model)

    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert retention.measure(load(config).model).share == 1.0
    assert retention.measure(model) == first


def test_a_network_that_answers_with_no_numbers_has_diverged(retaining):
    config = retaining()
    loaded = load(config)
    retention = Retention.of(config, loaded, CPU)
    loaded.model.conv_stem.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteWeightError, match=r"no numbers: the training diverged\. Lower --lr"):
        retention.measure(loaded.model)


def test_there_is_nothing_to_measure_without_images(retaining):
    config = retaining(retain=None, retain_size=None)
    assert Retention.of(config, load(config), CPU) is None


def test_images_are_of_the_networks_own_size_by_default(retaining):
    config = retaining(retain_size=None)
    retention = Retention.of(config, load(config), CPU)
    assert retention._split.store.shape == (70, 160, 160, 3)


def test_an_image_that_cannot_be_read_is_named(retaining, knowing, tmp_path):
    shutil.copytree(knowing / "images", tmp_path / "images")
    (tmp_path / "images" / "some" / "broken.png").write_bytes(b"none")
    config = retaining(retain=str(tmp_path / "images"))
    with pytest.raises(DataError, match=r"some/broken\.png"):
        Retention.of(config, load(config), CPU)


def test_a_network_that_is_confident_of_nothing(retaining, tiny_inputs):
    config = retaining(weights=str(tiny_inputs / "base.safetensors"))
    with pytest.raises(DataError, match="of none of its 70 images the pre-trained network is confident"):
        Retention.of(config, load(config), CPU)


def test_weights_without_their_classifier(retaining, knowing, tmp_path):
    state = load_file(knowing / "base.safetensors")
    save_file({name: t for name, t in state.items() if "classifier" not in name}, tmp_path / "body.safetensors")
    config = retaining(weights=str(tmp_path / "body.safetensors"))
    with pytest.raises(CheckpointError, match=r"body\.safetensors holds no classifier.*leave --retain out"):
        Retention.of(config, load(config), CPU)


def test_a_run_knows_the_classes_it_was_trained_for(retaining):
    first = training.finetune(retaining(epochs=1, retain=None, retain_size=None), quiet=True)
    state = load_file(first.path / "model.safetensors")
    state["classifier.weight"] *= 100
    save_file(state, first.path / "model.safetensors", {"base_model": "test_efficientnet"})
    kept = measured(retaining(model=str(first.path), weights=None))
    assert (kept.share, kept.images) == (1.0, 70)


def test_a_run_with_a_flattened_head_cannot_be_asked(retaining):
    run = training.finetune(retaining(epochs=1, head="flatten", size=64, retain=None, retain_size=None), quiet=True)
    config = retaining(model=str(run.path), weights=None)
    with pytest.raises(CheckpointError, match="another classifier than test_efficientnet was made with"):
        Retention.of(config, load(config), CPU)


def test_a_network_that_is_bound_to_its_size(retaining, tmp_path):
    state = timm.create_model("test_vit", num_classes=5).state_dict()
    state["head.weight"] *= 300
    save_file(state, tmp_path / "vit.safetensors")
    config = retaining(model="test_vit", weights=str(tmp_path / "vit.safetensors"), size=64, retain_size=None)
    with pytest.raises(ConfigurationError, match=r"at 64 pixels takes no images of 160 pixels.*--retain-size 64"):
        Retention.of(config, load(config), CPU)
    assert measured(replace(config, retain_size=64)).share == 1.0


@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's package tuxpaint-stamps-default")
def test_lite0_knows_most_photographs(tmp_path):
    loaded = models.load("lite0", classes=2, size=48)
    network, wanted = models.original("lite0", size=96)
    retention = Retention(network, wanted, loaded.head, STAMPS / "animals" / "birds", cache=tmp_path)
    kept = retention.measure(loaded.model)
    assert isinstance(kept, Kept)
    assert kept.share == 1.0
    assert kept.confident > kept.images / 2
    assert retention.measure(forget(loaded, by=0.1)).share < 0.9
