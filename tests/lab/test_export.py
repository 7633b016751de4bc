"""Exported files: loaded without tethertune, as their model cards say, and inside the balls in their own dtype."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tethertune.errors import ConfigurationError, RunError
from tethertune.lab import distances, export, formats, runs
from tethertune.lab.training import finetune

BALLS = {"method": "mars-pgm", "radius": 0.3, "head_radius": 1.0, "lr": 0.01}
DTYPES = ("float32", "bfloat16", "float16")

BLOCKED = """
import importlib.abc, sys
import torch

class NotOurs(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tethertune":
            raise ImportError("tethertune is blocked")

sys.meta_path.insert(0, NotOurs())
try:
    import tethertune
except ImportError:
    pass
else:
    raise SystemExit("tethertune could be imported")
torch.set_num_threads(1)
"""

LOGITS = """
images = torch.load("../images.pt")
with torch.no_grad():
    logits = model(images)
torch.save(getattr(logits, "logits", logits), "../logits.pt")
torch.save({name.removeprefix("timm_model."): tensor for name, tensor in model.state_dict().items()}, "../state.pt")
"""

ONNX_LOGITS = """
(logits,) = model.run(None, {"images": torch.load("../images.pt").numpy()})
torch.save(torch.from_numpy(logits), "../logits.pt"), torch.save({}, "../state.pt")
"""


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def trained(tiny):
    def train(**values):
        return finetune(tiny(**BALLS | {"epochs": 1} | values), quiet=True)

    return train


def usage(folder):
    """The code of a model card that loads what is beside it."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def load_elsewhere(folder, images, more=LOGITS):
    """Run the lines of a model card in a process without tethertune; gives the logits and the state dict there."""
    torch.save(images, folder.parent / "images.pt")
    code = BLOCKED + usage(folder) + more
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(folder.parent)},
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder.parent / "logits.pt"), torch.load(folder.parent / "state.pt")


def require_promise(state, base, layers, config):
    """By hand, in float64, for the convolutions and the head of test_efficientnet or a ResNet."""
    held = 0
    for name, layer in layers.items():
        if layer["radius"] is None:
            continue
        centre = base[name].double() if layer["role"] == "body" else torch.zeros(())
        moved = state[name].double() - centre
        norm = moved.flatten(1).abs().sum(dim=1).max() if config.method == "mars-pgm" else moved.square().sum().sqrt()
        assert norm <= layer["radius"]
        assert layer["value"] == pytest.approx(float(norm), rel=1e-12)
        held += 1
    return held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["mars-pgm", "l2-pgm"])
def test_the_promise_holds_in_the_dtype_of_the_file(trained, tiny_inputs, method, dtype):
    run = trained(method=method)
    folder = export.export(run.path, "safetensors", dtype=dtype)
    state, base = load_file(folder / "model.safetensors"), load_file(tiny_inputs / "base.safetensors")
    assert {tensor.dtype for tensor in state.values()} <= {export.DTYPES[dtype], torch.int64}
    layers = json.loads((folder / "distances.json").read_text())["layers"]
    assert require_promise(state, base, layers, run.config) == 17 + 1
    assert any(layer["active_rows"] for layer in layers.values() if layer["role"] == "body")
    if dtype == "float32":
        trained_state = load_file(run.path / "model.safetensors")
        assert all(torch.equal(tensor, trained_state[name]) for name, tensor in state.items())
    again = distances.compare(folder / "model.safetensors", tiny_inputs / "base.safetensors")
    assert {name: layer.mars for name, layer in again.layers.items()} == {n: layers[n]["mars"] for n in layers}


def test_a_cast_alone_would_not_hold_it(trained, tiny_inputs):
    run = trained()
    base = load_file(tiny_inputs / "base.safetensors")
    cast = {name: tensor.bfloat16() for name, tensor in load_file(run.path / "model.safetensors").items()}
    outside = [
        name
        for name, layer in run.distances["layers"].items()
        if layer["radius"] is not None
        and layer["role"] == "body"
        and (cast[name].double() - base[name].double()).flatten(1).abs().sum(dim=1).max() > layer["radius"]
    ]
    assert outside


def test_batch_norm_scales_as_the_authors_hold_them(trained, tiny_inputs):
    run = trained(convention="authors", bn="train", radius=0.15, lr=0.03)
    folder = export.export(run.path, "safetensors", dtype="float16")
    state, base = load_file(folder / "model.safetensors"), load_file(tiny_inputs / "base.safetensors")
    scales = [name for name in state if name.endswith("running_var")]
    now, then = (
        [weights[n.replace("running_var", "weight")].double() / (weights[n].double() + 1e-6).sqrt() for n in scales]
        for weights in (state, base)
    )
    moved = [float((a - b).abs().max()) for a, b in zip(now, then, strict=True)]
    assert len(moved) > 5
    assert 0.14 < max(moved) <= 0.15


class TestForms:
    @pytest.mark.parametrize(("to", "dtype"), [("timm", "float32"), ("huggingface", "bfloat16")])
    def test_of_timm(self, trained, images, to, dtype):
        run = trained()
        folder = export.export(run.path, to, dtype=dtype)
        logits, state = load_elsewhere(folder, images.to(export.DTYPES[dtype]))
        kept = load_file(folder / "model.safetensors")
        assert state.keys() == kept.keys()
        assert all(torch.equal(tensor.double(), kept[name].double()) for name, tensor in state.items())
        model = timm.create_model("test_efficientnet", num_classes=3).to(export.DTYPES[dtype]).eval()
        model.load_state_dict(kept)
        with torch.no_grad():
            assert torch.equal(logits, model(images.to(export.DTYPES[dtype])))

    def test_what_timm_and_transformers_read_of_the_images(self, trained):
        run = trained(scaling="raw", interpolation="bicubic", resize="stretch")
        folder = export.export(run.path, "huggingface")
        config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        wanted = timm.data.resolve_data_config({}, pretrained_cfg=config)
        assert wanted == {
            "input_size": [3, 32, 32],
            "interpolation": "bicubic",
            "mean": [0.0, 0.0, 0.0],
            "std": [1 / 255, 1 / 255, 1 / 255],
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
        import transformers

        read = transformers.AutoConfig.from_pretrained(folder)
        assert read.id2label == {0: "blue", 1: "green", 2: "red"}

    def test_of_torchvision(self, trained, tmp_path, images):
        from torchvision.models import resnet18

        torch.manual_seed(0)
        save_file(resnet18().state_dict(), tmp_path / "resnet18.safetensors")
        run = trained(model="torchvision:resnet18", weights=str(tmp_path / "resnet18.safetensors"), radius=1.0)
        folder = export.export(run.path, "torchvision", dtype="bfloat16")
        logits, state = load_elsewhere(folder, images)
        layers = json.loads((folder / "distances.json").read_text())["layers"]
        base = load_file(tmp_path / "resnet18.safetensors")
        assert require_promise(state, base, layers, run.config) == 20 + 1
        model = resnet18(num_classes=3).eval()
        model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
        with torch.no_grad():
            assert torch.equal(logits, model(images))
        for to in ("timm", "huggingface"):
            with pytest.raises(ConfigurationError, match=f"--to {to} takes networks of timm, and torchvision:resnet18"):
                export.export(run.path, to)

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
    def test_onnx(self, trained, tiny_inputs, images, dtype, tolerance):
        import onnx
        import onnxruntime

        run = trained(bn="train")
        folder = export.export(run.path, "onnx", dtype=dtype)
        if dtype == "float32":
            logits, _ = load_elsewhere(folder, images, ONNX_LOGITS)
        else:
            session = onnxruntime.InferenceSession(folder / "model.onnx")
            logits = torch.from_numpy(session.run(None, {"images": images.half().numpy()})[0])
        model = timm.create_model("test_efficientnet", num_classes=3).eval()
        model.load_state_dict(load_file(run.path / "model.safetensors"))
        with torch.no_grad():
            wanted = model(images)
        assert (logits - wanted).abs().max() <= tolerance * wanted.abs().max()
        written = onnx.load(folder / "model.onnx")
        state = {i.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(i))) for i in written.graph.initializer}
        layers = json.loads((folder / "distances.json").read_text())["layers"]
        base = load_file(tiny_inputs / "base.safetensors")
        assert require_promise(state, base, layers, run.config) == 17 + 1
        assert {item.key: item.value for item in written.metadata_props}["base_model"] == "test_efficientnet"

    def test_a_flattened_head_as_onnx_but_not_where_it_cannot_be_built(self, trained):
        run = trained(head="flatten", head_radius=None)
        for to in ("timm", "huggingface"):
            with pytest.raises(ConfigurationError, match=f"--to {to} cannot hold this run, whose --head flatten"):
                export.export(run.path, to)
        assert (export.export(run.path, "onnx") / "model.onnx").is_file()


class TestRefusals:
    def test_onnx_in_bfloat16(self, trained, tmp_path):
        run = trained()
        with pytest.raises(ConfigurationError, match=r"--dtype bfloat16: onnxruntime [\d.]+ cannot run such a network"):
            export.export(run.path, "onnx", dtype="bfloat16", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_dtype_whose_numbers_miss_a_ball(self, trained):
        run = trained(radius=1e-4)
        with pytest.raises(
            ConfigurationError, match=r"--dtype bfloat16 cannot keep the promise of this run, use float"
        ):
            export.export(run.path, "safetensors", dtype="bfloat16")
        assert export.export(run.path, "safetensors").name == "export-safetensors"

    def test_numbers_that_are_too_large(self, trained, tiny_inputs, tmp_path):
        state = load_file(tiny_inputs / "base.safetensors")
        state["bn1.running_var"] += 1e6
        save_file(state, tmp_path / "large.safetensors")
        run = trained(weights=str(tmp_path / "large.safetensors"))
        with pytest.raises(ConfigurationError, match=r"--dtype float16 cannot hold bn1.running_var"):
            export.export(run.path, "safetensors", dtype="float16")

    def test_a_folder_that_is_there(self, trained, tmp_path):
        run = trained()
        (tmp_path / "out").mkdir()
        export.export(run.path, "safetensors", output=tmp_path / "out")
        with pytest.raises(ConfigurationError, match="out is there already"):
            export.export(run.path, "safetensors", output=tmp_path / "out")

    def test_other_pre_trained_weights(self, trained, tiny_inputs, tmp_path):
        weights = tmp_path / "weights.safetensors"
        weights.write_bytes((tiny_inputs / "base.safetensors").read_bytes())
        run = trained(weights=str(weights))
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
        with pytest.raises(RunError, match="was trained from other pre-trained weights"):
            export.export(run.path, "timm")

    def test_a_run_that_is_not_complete_or_keeps_nothing(self, trained):
        run = trained()
        (run.path / "model.safetensors").unlink()
        with pytest.raises(RunError, match="keeps no weights"):
            export.export(run.path, "timm")
        info = json.loads((run.path / "run.json").read_text()) | {"status": "running"}
        (run.path / "run.json").write_text(json.dumps(info))
        with pytest.raises(RunError, match="is not complete"):
            export.export(run.path, "timm")


class TestCard:
    def test_says_all_that_must_be_known(self, trained):
        run = trained(seed=7)
        folder = export.export(run.path, "timm", dtype="bfloat16")
        card = (folder / "README.md").read_text()
        info = run.info
        for words in (
            f"SHA-256 `{info['model']['weights_sha256']}`",
            "radius 0.3, head_radius 1.0.",
            "| body, from pre-trained weights | mars |",
            info["data"]["fingerprint"],
            "seed 7",
            info["command"],
            f"tethertune export {run.path} --to timm --dtype bfloat16",
            "each of the 18 layers with a radius is within it, as computed in float64 from the bfloat16 numbers",
            "in float32, before its weights became bfloat16",
        ):
            assert words in card

    @pytest.mark.parametrize(("to", "library"), [("timm", "timm"), ("huggingface", "transformers")])
    def test_names_the_library_that_loads_it(self, trained, to, library):
        card = (export.export(trained().path, to) / "README.md").read_text()
        assert f'library_name: "{library}"' in card

    def test_promises_nothing_for_a_method_without_radii(self, trained):
        folder = export.export(trained(method="none", radius=None, head_radius=None).path, "timm")
        assert "The method none has no radii: the distances below are measured" in (folder / "README.md").read_text()


def test_exports_are_no_runs_and_go_where_their_run_is_made_anew(trained):
    run = trained()
    folder = export.export(run.path, "safetensors")
    assert [found.path for found in runs.find([run.path])] == [run.path]
    finetune(run.config, fresh=True, quiet=True)
    assert not folder.exists()


def test_every_form_is_offered_on_the_command_line(tethertune, trained):
    run = trained()
    code, out, err = tethertune("export", run.path, "--to", "timm", "--dtype", "float16")
    assert (code, err) == (0, "")
    assert out == f"{run.path / 'export-timm-float16'}\n"
    _, out, _ = tethertune("export", "--help")
    assert all(form in out for form in formats.FORMATS)
    code, out, err = tethertune("export", run.path, "--to", "torchvision")
    assert (code, out) == (2, "")
    assert err == (
        "--to torchvision takes networks of torchvision, and test_efficientnet is one of timm: use --to timm,"
        " huggingface, safetensors or onnx.\n"
    )
