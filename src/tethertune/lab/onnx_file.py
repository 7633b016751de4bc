"""A network as an ONNX file that holds the very weights, and gives what PyTorch gives.

The exporter's own optimiser folds batch normalisation into the convolutions before it, and what is folded is at no
distance that anyone trained: it stays off, so each weight is in the file under its name, bit for bit. A runtime may
fold in memory when it loads the file; the function is the same, up to rounding.
"""

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tethertune.errors import ConfigurationError, MissingExtraError

__all__ = ["write"]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""How far logits may be from those of PyTorch in float32, as a share of the largest: a few roundings a layer."""


def write(path: Path, network: nn.Module, size: int, notes: Mapping[str, str]) -> None:
    """Write a network to an ONNX file with any number of images a batch, and compare what onnxruntime makes of it.

    Args:
        path: The file.
        network: In eval mode, on the CPU; its parameters have one dtype, which its images (b, 3, size, size) take.
        size: Side of the images in pixels.
        notes: Metadata of the file.

    Raises:
        MissingExtraError: A package that writes or runs ONNX files is not installed.
        ConfigurationError: onnxruntime cannot run the network in its dtype, or gives other logits; or the file does not
            hold the weights as they are.
    """
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"--to onnx needs {', '.join(missing)}: pip install 'tethertune[onnx]' onnxruntime, which runs the file to"
            " check it."
        )
    import onnx

    dtype = next(network.parameters()).dtype
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network,
        (images[:2],),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    program.save(path)
    model = onnx.load(path)
    _require_weights(model, network)
    onnx.helper.set_model_props(model, dict(sorted(notes.items())))
    onnx.save(model, path)
    _require_equal(path, network, images)


def _require_weights(model: Any, network: nn.Module) -> None:
    """Check that the file holds every parameter as it is.

    Raises:
        ConfigurationError: It does not.
    """
    import onnx

    held = {item.name: item for item in model.graph.initializer}
    for name, parameter in network.named_parameters():
        if name not in held or not _same(onnx.numpy_helper.to_array(held[name]), parameter.detach()):
            raise ConfigurationError(
                f"--to onnx: this version of PyTorch's exporter does not write {name} as it is, so the file would not"
                " hold the promise: use --to safetensors, or another version of PyTorch."
            )


def _same(array: Any, tensor: Tensor) -> bool:
    """Whether an array, in whatever dtype stands for the tensor's, has its values."""
    return torch.equal(torch.from_numpy(array.astype("float64")), tensor.double())


def _require_equal(path: Path, network: nn.Module, images: Tensor) -> None:
    """Check that onnxruntime gives the logits that PyTorch gives in float32.

    Raises:
        ConfigurationError: It does not, or it cannot run the file.
    """
    import onnxruntime

    dtype = str(images.dtype).removeprefix("torch.")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = _ort_value(onnxruntime, images)
        found = torch.from_numpy(session.run_with_ort_values(["logits"], {"images": given})[0].numpy()).double()
    except Exception as error:  # its exceptions have no common base
        raise ConfigurationError(
            f"--to onnx --dtype {dtype}: onnxruntime {onnxruntime.__version__} cannot run such a network on a CPU"
            f" ({str(error).replace(str(path), path.name).partition(chr(10))[0]}): use --dtype float32."
        ) from error
    with torch.no_grad():
        wanted = copy.deepcopy(network).float()(images.float()).double()
    error_size = float((found - wanted).abs().max())
    if not error_size <= _TOLERANCE[images.dtype] * float(wanted.abs().max()):
        raise ConfigurationError(
            f"--to onnx --dtype {dtype}: onnxruntime {onnxruntime.__version__} gives logits that differ by"
            f" {error_size:.3g} from PyTorch's, of at most {float(wanted.abs().max()):.3g}: use --dtype float32, or"
            " another form."
        )


def _ort_value(onnxruntime: Any, images: Tensor) -> Any:
    """Images for onnxruntime; NumPy has no bfloat16."""
    if images.dtype != torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(images.numpy())
    bits, code = images.view(torch.int16).numpy(), 16  # TensorProto.BFLOAT16
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, code)
