import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config

from tethertune.errors import ConfigurationError
from tethertune.lab import models
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.formats import FORMATS, Exported
from tethertune.lab.images import fit, resampling
from tethertune.lab.runs import Run

torch.set_num_threads(1)

CLASSES = ["blue", "große Katze", 'red "deep"']
NAMES = ("test_efficientnet", "test_vit", "torchvision:shufflenet_v2_x0_5")
SIZE = 64  # not what test_vit is made for


@pytest.fixture
def make_exported(tmp_path):
    """``make_exported(name)`` is an untrained network on its way into a file."""

    def make(name, dtype=torch.float32, **values):
        loaded = models.load(name, classes=3, size=SIZE, pretrained=False, head=values.get("head", "pool"))
        loaded.model.eval().requires_grad_(requires_grad=False).to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loaded.model.get_submodule(loaded.head).weight.normal_()
        config = FinetuneConfig(name, "fashion", size=SIZE, **values)
        info = {"config": config.to_dict(), "data": {"classes": CLASSES}}
        return Exported(Run(tmp_path / "run", info, [], {}), loaded, {"from": "a test"})

    return make


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_usage(tmp_path, monkeypatch):
    """``run_usage(to, exported)`` writes a form and runs the lines that load it, in its folder; gives their names."""

    def run(to, exported):
        form = FORMATS[to]
        form.write(tmp_path, exported)
        assert (tmp_path / form.file).is_file()
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(form.usage(exported), names)
        return names

    return run


@pytest.mark.parametrize(
    ("to", "name"),
    [*itertools.product(("timm", "huggingface"), NAMES[:2]), ("torchvision", NAMES[2])],
)
def test_what_the_lines_load_is_the_network(make_exported, run_usage, images, to, name):
    exported = make_exported(name)
    model = run_usage(to, exported)["model"]
    assert not model.training
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(getattr(logits, "logits", logits), exported.network(images))


@pytest.mark.parametrize("name", NAMES)
def test_safetensors_and_onnx_take_networks_of_every_library(make_exported, run_usage, images, name):
    exported = make_exported(name)
    state = run_usage("safetensors", exported)["state"]
    wanted = exported.network.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    (logits,) = run_usage("onnx", exported)["model"].run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), exported.network(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("to", ["safetensors", "timm", "huggingface"])
def test_the_file_keeps_the_notes_and_the_dtype(make_exported, tmp_path, to):
    exported = make_exported(NAMES[0], torch.bfloat16)
    assert exported.dtype == torch.bfloat16
    FORMATS[to].write(tmp_path, exported)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["from"] == "a test"
        assert file.get_tensor("conv_stem.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(("to", "name"), [("timm", NAMES[2]), ("huggingface", NAMES[2]), ("torchvision", NAMES[0])])
def test_networks_of_another_library_are_refused_and_leave_nothing(make_exported, tmp_path, to, name):
    with pytest.raises(ConfigurationError, match=f"--to {to} takes networks of .*, and {name} is one of"):
        FORMATS[to].write(tmp_path, make_exported(name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["timm", "huggingface", "torchvision"])
def test_a_network_without_its_pooling_is_refused_where_it_would_be_built_anew(make_exported, tmp_path, to):
    exported = make_exported("torchvision:resnet18" if to == "torchvision" else NAMES[0], head="flatten")
    with pytest.raises(ConfigurationError, match=f"--to {to} cannot hold this run, whose --head flatten"):
        FORMATS[to].write(tmp_path, exported)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_timm_prepares_images_as_they_were_trained_on(make_exported, tmp_path, to, resize):
    exported = make_exported(NAMES[0], resize=resize)
    FORMATS[to].write(tmp_path, exported)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == CLASSES
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    photo, loaded = Image.fromarray(noise), exported.loaded
    crop = None if resize == "stretch" else loaded.crop
    pixels = torch.tensor(fit(photo, SIZE, resampling(loaded.interpolation), crop)).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    prepare = create_transform(**resolve_data_config(pretrained_cfg=config["pretrained_cfg"]))
    torch.testing.assert_close(prepare(photo), (pixels / 255 - mean) / std)
