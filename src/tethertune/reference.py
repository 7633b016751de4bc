"""The reference: the pre-trained weights W0 that distances are measured from, kept by parameter name."""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tethertune.errors import ReferenceMismatchError, did_you_mean
from tethertune.rows import Layer, clean_name
from tethertune.sharding import full, local, shard_like

__all__ = ["Reference", "Source"]


class Reference:
    """Read-only weights by name, checked against the layers that they are the reference of.

    Args:
        tensors: Weights by the clean names of the model's parameters.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> reference = Reference.of(model)
        >>> torch.equal(reference["weight"], model.weight)
        True
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str] | None = None) -> "Reference":
        """A copy of a model's parameters (and running variances) as they are now, or of the named ones."""
        wanted = None if names is None else set(names)
        tensors = _tensors_of(model)
        return cls({n: t.detach().clone() for n, t in tensors.items() if wanted is None or n in wanted})

    @classmethod
    def load(cls, source: "Source", layers: Iterable[Layer]) -> "Reference":
        """The reference weights of the given layers, checked for presence and shape.

        Args:
            source: A state dict, a module, another reference, or the path of a safetensors file (or of a folder that
                holds ``model.safetensors``), which is mapped, not read. Other sources are copied.
            layers: The layers that need a reference; a tied layer is found under any of its names.

        Raises:
            ReferenceMismatchError: A weight is missing or of another shape, or the file cannot be read.
        """
        tensors = _open(source)
        ours = isinstance(source, Reference | str | Path)  # anything else may change later, or be the trained weights
        found: dict[str, Tensor] = {}
        faults: list[str] = []
        for layer in layers:
            name = next((n for n in layer.names if n in tensors), None)
            if name is None:
                faults.append(f"{layer.name} is missing{did_you_mean(layer.name, tensors)}".rstrip("?"))
            elif tensors[name].shape != layer.weight.shape:
                faults.append(
                    f"{layer.name} has shape {tuple(tensors[name].shape)}, the model's {tuple(layer.weight.shape)}"
                )
            else:
                found[layer.name] = tensors[name]
                if layer.rows.kind == "scale":
                    if layer.variance_name in tensors:
                        found[layer.variance_name] = tensors[layer.variance_name]
                    else:
                        faults.append(f"{layer.variance_name} is missing, which convention='authors' needs")
        if faults:
            more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ReferenceMismatchError(
                f"The reference is not of this network: {'; '.join(faults[:3])}{more}."
                " Give the weights that this model was loaded from."
            )
        return cls({n: t.detach() if ours else t.detach().clone() for n, t in found.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Reference":
        """The same weights in another dtype or on another device."""
        return Reference({n: t.to(dtype=dtype, device=device) for n, t in self._tensors.items()})

    def fingerprint(self) -> str:
        """``"sha256:..."`` over names, shapes, dtypes and bytes, in the order of the names."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor = full(self._tensors[name]).cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor))
        return f"sha256:{digest.hexdigest()}"


Source: TypeAlias = Reference | Mapping[str, Tensor] | nn.Module | str | Path
"""Where reference weights come from: a state dict, a module, or the path of a safetensors file or its folder."""


def like(reference: Tensor, weight: Tensor, device: torch.device) -> Tensor:
    """The local reference of a weight: on the given device, sharded as the weight is, with the weight's strides."""
    reference, weight = shard_like(reference, weight), local(weight)
    if reference.device == device and reference.stride() == weight.stride():
        return reference
    return torch.empty_like(weight, dtype=reference.dtype, device=device).copy_(reference)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {clean_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    tensors |= {clean_name(n): b for n, b in model.named_buffers() if n.endswith("running_var")}
    return tensors


def _open(source: Source) -> dict[str, Tensor]:
    if isinstance(source, Reference):
        return source._tensors
    if isinstance(source, nn.Module):
        return _tensors_of(source)
    if isinstance(source, Mapping):
        return {clean_name(n): t for n, t in source.items() if isinstance(t, Tensor)}
    path = Path(source)
    if path.is_dir():
        path /= "model.safetensors"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {clean_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ReferenceMismatchError(
            f"reference={str(source)!r} is not a readable safetensors file ({error});"
            " load other formats yourself and pass the state dict."
        ) from error


def _bytes(tensor: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """The bytes of a contiguous CPU tensor, without a copy and without NumPy."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
