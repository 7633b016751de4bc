"""The forms in which ecosystems load a network: the files of each, and the lines that load them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tethertune.errors import ConfigurationError
from tethertune.lab import architectures, files, onnx_file, runs
from tethertune.lab.models import LoadedModel
from tethertune.lab.runs import Run

__all__ = ["FORMATS", "Exported", "Format"]


@dataclass(frozen=True)
class Exported:
    """A fine-tuned network on its way into a file.

    Attributes:
        run: The run that it is the result of.
        loaded: The network, in eval mode, on the CPU, in the dtype of the file, and what must be known to use it.
        notes: What the file says of itself.
    """

    run: Run
    loaded: LoadedModel
    notes: dict[str, str]

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self.loaded.model

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the network's outputs."""
        return list(self.run.info["data"]["classes"])

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return next(self.network.parameters()).dtype


@dataclass(frozen=True)
class Format:
    """One form.

    Attributes:
        library: What loads it, in the words of model cards.
        file: The name of the file with the weights.
        write: Writes a network into an empty folder.
        usage: The Python lines that load it, run inside that folder, as ``model``.
    """

    library: str
    file: str
    write: Callable[[Path, Exported], None]
    usage: Callable[[Exported], str]


def _write_safetensors(folder: Path, exported: Exported) -> None:
    runs.write_weights(folder / "model.safetensors", exported.network.state_dict(), exported.notes)


def _safetensors_usage(exported: Exported) -> str:
    del exported
    return 'from safetensors.torch import load_file\n\nstate = load_file("model.safetensors")'


def _write_timm(folder: Path, exported: Exported) -> None:
    _require_library(exported, "timm", "timm")
    _write_safetensors(folder, exported)
    files.write_json(folder / "config.json", _timm_config(exported))


def _timm_usage(exported: Exported) -> str:
    del exported
    return 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True).eval()'


def _write_huggingface(folder: Path, exported: Exported) -> None:
    _require_library(exported, "timm", "huggingface")
    _write_safetensors(folder, exported)
    wrapper = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperForImageClassification"],
        "dtype": str(exported.dtype).removeprefix("torch."),
    }
    files.write_json(folder / "config.json", wrapper | _timm_config(exported))


def _huggingface_usage(exported: Exported) -> str:
    del exported
    return (
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        'processor = AutoImageProcessor.from_pretrained(".")\n'
        'model = AutoModelForImageClassification.from_pretrained(".").eval()'
    )


def _timm_config(exported: Exported) -> dict[str, object]:
    """What timm keeps beside weights, which transformers reads too: the network, its classes and its images."""
    loaded, network = exported.loaded, exported.network
    architecture = architectures.find(loaded.name)
    published: dict[str, object] = vars(network)["pretrained_cfg"]
    stretched = exported.run.config.resize == "stretch"
    return {
        "architecture": architecture.constructor,
        "num_classes": len(exported.classes),
        "num_features": vars(network)["num_features"],
        "label_names": exported.classes,
        "model_args": architecture.options(loaded.size),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, loaded.size, loaded.size],
            "fixed_input_size": published.get("fixed_input_size", False),
            "pool_size": None,
            "interpolation": loaded.interpolation,
            "crop_pct": 1.0 if stretched else loaded.crop,
            "crop_mode": "squash" if stretched else "center",
            "mean": list(loaded.mean),
            "std": list(loaded.std),
            "num_classes": len(exported.classes),
            "first_conv": published.get("first_conv"),
            "classifier": loaded.head,
        },
    }


def _write_torchvision(folder: Path, exported: Exported) -> None:
    _require_library(exported, "torchvision", "torchvision")
    torch.save({name: tensor.contiguous() for name, tensor in exported.network.state_dict().items()}, folder / _PICKLE)


def _torchvision_usage(exported: Exported) -> str:
    architecture = architectures.find(exported.loaded.name)
    options = {"num_classes": len(exported.classes)} | architecture.options(exported.loaded.size)
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return (
        f"import torch\nimport torchvision\n\nmodel = torchvision.models.{architecture.constructor}({given})\n"
        f'model.load_state_dict(torch.load("{_PICKLE}", weights_only=True))\nmodel.eval()'
    )


def _require_library(exported: Exported, library: str, target: str) -> None:
    """Check that the library can build the network.

    Raises:
        ConfigurationError: It is of another library, or its pooling was taken out.
    """
    name = exported.loaded.name
    other = architectures.find(name).library
    if other != library:
        raise ConfigurationError(
            f"--to {target} takes networks of {library}, and {name} is one of {other}: use --to"
            f" {'timm, huggingface' if other == 'timm' else 'torchvision'}, safetensors or onnx."
        )
    if exported.run.config.head == "flatten":
        raise ConfigurationError(
            f"--to {target} cannot hold this run, whose --head flatten took the pooling out, so that {library} does not"
            " build such a network: use --to safetensors or onnx."
        )


def _write_onnx(folder: Path, exported: Exported) -> None:
    loaded = exported.loaded
    notes = exported.notes | {"mean": str(list(loaded.mean)), "std": str(list(loaded.std))}
    onnx_file.write(folder / "model.onnx", exported.network, loaded.size, notes)


def _onnx_usage(exported: Exported) -> str:
    size, dtype = exported.loaded.size, str(exported.dtype).removeprefix("torch.")
    return (
        "import onnxruntime\n\n"
        'model = onnxruntime.InferenceSession("model.onnx")\n'
        f'# (logits,) = model.run(None, {{"images": images}}), {dtype}, (batch, 3, {size}, {size}), normalised'
    )


_PICKLE = "model.pth"

FORMATS = {
    "safetensors": Format("safetensors", "model.safetensors", _write_safetensors, _safetensors_usage),
    "timm": Format("timm", "model.safetensors", _write_timm, _timm_usage),
    "torchvision": Format("torchvision", _PICKLE, _write_torchvision, _torchvision_usage),
    "huggingface": Format("transformers", "model.safetensors", _write_huggingface, _huggingface_usage),
    "onnx": Format("onnx", "model.onnx", _write_onnx, _onnx_usage),
}
"""Every form by the word after ``--to``."""
