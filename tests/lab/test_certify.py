import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tethertune.errors import CheckpointError, ConfigurationError, ReferenceMismatchError, RunError
from tethertune.lab import models, runs
from tethertune.lab.certify import certify
from tethertune.lab.training import finetune

DECLARED = {"method": "mars-pgm", "radius": 0.1, "head_radius": 1.0, "affine": "frozen"}
DECLARATION = "the run's configuration declares every radius"
SAME_DATA = "these are the examples that the network was trained on"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a network that the calculus covers."""
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(models.load("test_resnet", classes=2, size=32, pretrained=False).model.state_dict(), path)
    return path


@pytest.fixture
def resnet(tiny, weights):
    """``resnet(**options)`` fine-tunes a tiny ResNet for an epoch, once for all tests; gives its run."""

    def train(**options):
        output = str(weights.parent / "runs")
        values = {"model": "test_resnet", "weights": str(weights), "epochs": 1, "output": output}
        values |= {**DECLARED, **options}
        return finetune(tiny(**values), quiet=True)

    return train


def statuses(finding):
    return {check.name: check.status for check in finding.certificate.checks}


def details(finding):
    return {check.name: check.detail for check in finding.certificate.checks}


def test_a_run_that_declares_its_radii(resnet):
    run = resnet()
    finding = certify(run.path)
    found = finding.certificate

    assert (found.kind, found.mode, found.samples, found.classes) == ("certificate", "declared", 21, 3)
    assert found.paid == ("the head's bias", "the margin")
    assert statuses(finding)[DECLARATION] == statuses(finding)[SAME_DATA] == "pass"
    scale = (1.0 + 1e-5 + 1e-9) / math.sqrt(1 + 1e-5)  # random batch norm: weight 1, variance 1, eps 1e-5
    assert all(layer.measured_distance <= layer.distance <= 0.1 * scale for layer in found.layers)
    assert any(layer.measured_distance > 0 for layer in found.layers)
    assert found.head_bound == pytest.approx(1, rel=1e-4)
    assert 0 < found.head_bias < 0.5
    assert "--head-bias frozen declares it" in details(finding)[DECLARATION]
    assert found.as_dict() == json.loads((run.path / "certificate.json").read_text())["certificate"]
    assert runs.load(run.path).certificate == finding.to_dict()


def test_images_are_those_that_the_run_was_trained_on(resnet):
    run = resnet(per_class=4, seed=3)
    found = certify(run.path).certificate
    loss, error = _evaluate(run)

    assert found.samples == 12
    assert found.empirical_error == pytest.approx(error)
    assert certify(run.path, loss="clipped-ce").certificate.empirical_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({"scaling": "raw"}, 21),
        ({"interpolation": "nearest", "resize": "stretch"}, 21),
        ({"train_on": "train+validation"}, 30),
        ({"label_noise": 0.3}, 21),
    ],
)
def test_however_a_run_took_its_images_they_are_the_same(resnet, options, samples):
    run = resnet(**options)
    finding = certify(run.path, loss="clipped-ce")
    loss, error = _evaluate(run)

    assert finding.certificate.samples == samples
    assert finding.certificate.empirical_error == pytest.approx(error)
    assert finding.certificate.empirical_loss == pytest.approx(loss, rel=1e-4)
    assert statuses(finding)[SAME_DATA] == "pass"
    noise = details(finding).get("the labels are those of new images", "")
    assert ("as many wrong labels" in noise) == ("label_noise" in options)


def _evaluate(run):
    """The run's clipped cross-entropy and error on its training images, through the trainer's own loading."""
    from accelerate import Accelerator

    from tethertune.lab.training import Training

    training = Training(run.config, Accelerator(cpu=True))
    training.network.load_state_dict(load_file(run.path / "model.safetensors"))
    training.network.eval()
    images, labels = training._load(training.dataset.train, torch.arange(len(training.dataset.train)))
    with torch.no_grad():
        logits = training.network(images)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (losses / math.log(2)).clamp(max=1).mean().item(), (logits.argmax(1) != labels).double().mean().item()


@pytest.mark.parametrize(
    ("options", "words", "paid"),
    [
        ({"affine": "free"}, "--affine free moves biases and batch norm", "bias shifts of"),
        ({"bn": "train"}, "--bn train moves the statistics", "distances of"),
        ({"head_radius": None}, "1 layers have no radius, fc.weight first", "the head's norm"),
        ({"exclude": ("layer4*",)}, "layers have no radius, layer4.0.conv1.weight first", "distances of"),
        ({"convention": "authors", "radius": 0.0}, "--convention authors bounds other rows", "the head's norm"),
    ],
)
def test_what_is_not_declared_is_paid_for(resnet, options, words, paid):
    finding = certify(resnet(**options).path)

    assert finding.certificate.mode == "declared"
    assert statuses(finding)[DECLARATION] == "fail"
    assert words in details(finding)[DECLARATION]
    assert any(what.startswith(paid) for what in finding.certificate.paid)


def test_a_short_suffix_moves_and_the_rest_is_frozen_by_declaration(resnet):
    found = certify(resnet(radius=0.0, exclude=("layer4*", "fc*"), head_radius=None).path).certificate

    moved = {layer.name for layer in found.layers if layer.distance > 0}
    assert moved
    assert all(name.startswith("layer4") for name in moved)
    assert any(layer.name.startswith("layer3") and layer.distance == 0 for layer in found.layers)


def test_a_suffix_may_move_within_its_radius_and_all_is_declared(resnet):
    still = ("conv1", "bn1", "layer[123]*", "layer4.0.conv?", "layer4.0.bn?")
    finding = certify(resnet(freeze=still, head_bias="frozen").path, margin=1.0)
    found = finding.certificate

    assert [layer.name for layer in found.layers if layer.distance > 0] == ["layer4.0.downsample.1"]
    assert (found.paid, found.price) == ((), 0)
    assert statuses(finding)[DECLARATION] == "pass"
    assert -math.inf < dict(found.distance.parts)["moved"] < found.product.log10


def test_a_frozen_body_leaves_the_frozen_part_alone(resnet):
    found = certify(resnet(radius=0.0).path).certificate

    assert found.distance.parts[1] == ("moved", -math.inf)
    assert found.as_dict()["distance"]["parts"][1] == ["moved", None]
    assert [bound.log10 for bound in found.comparison[:2]] == [-math.inf, -math.inf]


def test_what_a_radius_of_0_froze_is_frozen_on_the_grid_too(resnet):
    found = certify(resnet(radius=0.0).path, mode="grid").certificate

    assert found.distance.parts[1] == ("moved", -math.inf)
    assert found.paid == ("the head's norm", "the head's bias", "the margin")


@pytest.mark.parametrize(
    ("options", "bound"), [({"head_bias": "frozen"}, 0), ({"include": ("fc.bias",)}, 1)], ids=["frozen", "in the ball"]
)
def test_a_bias_of_the_head_that_is_declared_costs_nothing(resnet, options, bound):
    run = resnet(radius=0.0, **options)
    finding = certify(run.path, margin=2.0)

    assert finding.certificate.head_bias == pytest.approx(bound, rel=1e-4)
    assert (finding.certificate.paid, finding.certificate.price) == ((), 0)
    assert statuses(finding)[DECLARATION] == "pass"
    assert details(finding)[DECLARATION] == "those of the weights and of the head's bias"
    bias = load_file(run.path / "model.safetensors")["fc.bias"]
    assert bool(bias.any()) == (bound > 0)
    if not bound:
        assert certify(run.path, mode="grid", margin=2.0).certificate.paid == ("the head's norm",)


def test_frobenius_radii_count_too(resnet):
    found = certify(resnet(method="l2-pgm", radius=0.1).path).certificate
    assert (found.mode, found.paid) == ("declared", ("the head's bias", "the margin"))


def test_a_run_without_radii_is_on_the_grid(resnet):
    run = resnet(method="none", radius=None, head_radius=None, affine="free")
    finding = certify(run.path)

    assert finding.certificate.mode == "grid"
    assert any("distances" in what for what in finding.certificate.paid)
    with pytest.raises(ConfigurationError, match=r"declares no radii.*--mode grid"):
        certify(run.path, mode="declared")


def test_a_declared_margin_costs_nothing(resnet):
    path = resnet().path
    assert certify(path, margin=2.0).certificate.paid == ("the head's bias",)


def test_other_images_are_a_warning(resnet, tiny_inputs, tmp_path):
    run = resnet()
    shutil.copytree(tiny_inputs / "colours", tmp_path / "others")
    (tmp_path / "others" / "train" / "red" / "0.png").unlink()
    finding = certify(run.path, str(tmp_path / "others"))

    assert statuses(finding)[SAME_DATA] == "fail"
    assert finding.certificate.samples == 20


def test_a_reference_that_learned_from_the_same_images(resnet):
    first = resnet()
    second = resnet(model=str(first.path), weights=None)
    independence = "the reference is independent of the training sample"

    assert statuses(certify(first.path))[independence] == "unknown"
    assert statuses(certify(second.path))[independence] == "fail"


def test_a_bare_checkpoint_is_on_the_grid(resnet, tiny_inputs, tmp_path):
    run = resnet(radius=0.3, affine="free")
    shutil.copy(run.path / "model.safetensors", tmp_path / "model.safetensors")
    bare = certify(tmp_path / "model.safetensors", str(tiny_inputs / "colours"), cache=tiny_inputs / "cache")
    known = certify(run.path, mode="grid")

    assert bare.certificate.mode == "grid"
    assert statuses(bare)[SAME_DATA] == "unknown"
    assert bare.certificate.gap_log10 == known.certificate.gap_log10
    assert not (tmp_path / "certificate.json").exists()
    with pytest.raises(ConfigurationError, match="give --data DATA"):
        certify(tmp_path / "model.safetensors")


def test_a_bare_checkpoint_with_a_flattened_head(resnet, tiny_inputs, tmp_path):
    run = resnet(head="flatten", size=64, affine="free")
    shutil.copy(run.path / "model.safetensors", tmp_path / "model.safetensors")
    bare = certify(tmp_path / "model.safetensors", str(tiny_inputs / "colours"), cache=tiny_inputs / "cache")

    assert bare.certificate.gap_log10 == certify(run.path, mode="grid").certificate.gap_log10


def test_a_reference_given_by_its_file(resnet, weights):
    run = resnet()
    given = certify(run.path, reference=str(weights))

    assert given.reference == str(weights)
    assert given.certificate == certify(run.path).certificate


def test_around_another_reference_nothing_was_declared(resnet, tmp_path):
    run = resnet(head_bias="frozen")
    shutil.copy(run.path / "model.safetensors", tmp_path / "other.safetensors")
    finding = certify(run.path, reference=str(tmp_path / "other.safetensors"), margin=1.0)

    assert finding.certificate.mode == "grid"
    assert finding.certificate.price > 0
    assert statuses(finding)[DECLARATION] == "fail"
    assert "around other weights than --reference" in details(finding)[DECLARATION]
    with pytest.raises(ConfigurationError, match="declares no radii"):
        certify(run.path, reference=str(tmp_path / "other.safetensors"), mode="declared")


def test_a_reference_that_is_a_run_of_the_same_images_however_it_is_named(resnet, weights):
    first = resnet(epochs=2)
    third = resnet(model=str(resnet(model=str(first.path), weights=None).path), weights=None, head_radius=2.0)
    independence = "the reference is independent of the training sample"

    assert statuses(certify(third.path))[independence] == "fail"
    for place in (first.path, first.path / "model.safetensors"):
        assert statuses(certify(resnet().path, reference=str(place)))[independence] == "fail"
    assert statuses(certify(resnet().path, reference=str(weights)))[independence] == "unknown"


def test_the_authors_scales_with_frozen_affine_are_paid_for(resnet):
    finding = certify(resnet(convention="authors", radius=0.5).path)

    assert statuses(finding).get(DECLARATION, "fail") == "fail"
    assert finding.certificate.price > 0


def test_a_network_that_no_bound_covers(tiny):
    run = finetune(tiny(epochs=1), quiet=True)
    finding = certify(run.path)

    assert finding.certificate is None
    assert "blocks.3.0.se" in finding.refusal
    assert "squeeze-and-excitation" in finding.refusal
    assert {layer.name for layer in finding.measurements} >= {"conv_stem.weight", "conv_head.weight"}
    assert finding.to_dict()["certificate"] is None
    assert not (run.path / "certificate.json").exists()


@pytest.mark.parametrize("delta", [0, 1, -0.1, math.nan])
def test_delta_is_a_probability(tmp_path, delta):
    with pytest.raises(ConfigurationError, match="delta"):
        certify(tmp_path, delta=delta)


@pytest.mark.parametrize("margin", [0, -1, math.inf])
def test_a_margin_is_positive(tmp_path, margin):
    with pytest.raises(ConfigurationError, match="margin"):
        certify(tmp_path, margin=margin)


def test_a_margin_goes_with_the_ramp(tmp_path):
    with pytest.raises(ConfigurationError, match=r"--margin 1.0 goes with --loss ramp"):
        certify(tmp_path, loss="clipped-ce", margin=1.0)


def test_a_reference_of_another_network(resnet, tmp_path, weights):
    path = resnet().path
    state = load_file(weights)
    save_file({name: tensor for name, tensor in state.items() if name != "conv1.0.weight"}, tmp_path / "less")
    save_file(state | {"layer1.0.conv1.weight": torch.ones(3, 3, 3, 3)}, tmp_path / "other")
    for name in ("less", "other"):
        with pytest.raises(ReferenceMismatchError, match="another network"):
            certify(path, reference=str(tmp_path / name))


def test_weights_that_have_changed_since(resnet, weights, tmp_path):
    mine = tmp_path / "mine.safetensors"
    shutil.copy(weights, mine)
    run = resnet(weights=str(mine))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, mine)
    with pytest.raises(CheckpointError, match=r"was trained from .* give the weights .* with --reference"):
        certify(run.path)


def test_other_classes(resnet, tiny_inputs, tmp_path):
    run = resnet()
    shutil.copy(run.path / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fc.*shape"):
        certify(tmp_path / "model.safetensors", "fashion", cache=tiny_inputs / "cache")


def test_an_unfinished_run(resnet, tmp_path):
    run = resnet(output=str(tmp_path))
    info = run.info | {"status": "running"}
    (run.path / "run.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match="not complete"):
        certify(run.path)


def test_an_anonymous_checkpoint(weights, tiny_inputs):
    with pytest.raises(ConfigurationError, match="add --arch NAME"):
        certify(weights, str(tiny_inputs / "colours"))


def test_infinite_radii_come_back_from_the_run(resnet):
    run = resnet(radius=math.inf)
    config = run.config
    assert config.radius == math.inf
    assert replace(config) == config
