"""The reference: the pre-trained weights W0 that distances are measured from, kept by parameter name.

What is kept is at most one copy of the layers that have a ball, and less wherever that changes no number: in the
narrowest dtype that holds every weight (half a copy of a float32 model that was loaded from a bfloat16 checkpoint), on
each rank only the part beside its shard, and nothing at all of a safetensors file, which stays mapped: its pages are
the system's, shared by every process that maps the same file.
"""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tethertune.errors import ReferenceMismatchError
from tethertune.rows import Layer, clean_name
from tethertune.sharding import from_part, full, is_sharded, local, reduce_over_shards, shard_like, sharded_alike

__all__ = ["Reference", "Source", "stretches"]

_NARROW = (torch.bfloat16, torch.float16, torch.float32)
_PART = 1 << 18  # elements of a stretch


class Reference:
    """Read-only weights by name, checked against the layers that they are the reference of.

    Args:
        tensors: Weights by the clean names of the model's parameters; kept, not copied, so pass none that are trained.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> reference = Reference.of(model)
        >>> torch.equal(reference["weight"], model.weight)
        True
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self._mapped: frozenset[str] = frozenset()
        self._rounded_from: str | None = None

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str] | None = None) -> "Reference":
        """A copy of a model's parameters (and running variances) as they are now, or of the named ones."""
        seen = cls(_tensors_of(model))
        return seen.part(seen if names is None else names).keep()

    @classmethod
    def view(cls, source: "Source", layers: Iterable[Layer]) -> "Reference":
        """The reference weights of the given layers as they lie in the source, checked for presence and shape.

        Args:
            source: As in :meth:`load`.
            layers: The layers that need a reference; a tied layer is found under any of its names.

        Raises:
            ReferenceMismatchError: A weight is missing or of another shape, or the file cannot be read.
        """
        tensors = source._tensors if isinstance(source, Reference) else _open(source)
        found: dict[str, str] = {}
        faults: list[str] = []
        for layer in layers:
            name = next((n for n in layer.names if n in tensors), None)
            if name is None:
                faults.append(f"{layer.name} is missing")
            elif tensors[name].shape != layer.weight.shape:
                faults.append(
                    f"{layer.name} has shape {tuple(tensors[name].shape)}, the model's {tuple(layer.weight.shape)}"
                )
            else:
                found[layer.name] = name
                if layer.rows.kind == "scale":
                    if layer.variance_name in tensors:
                        found[layer.variance_name] = layer.variance_name
                    else:
                        faults.append(f"{layer.variance_name} is missing, which convention='authors' needs")
        if faults:
            more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ReferenceMismatchError(
                f"The reference is not of this network: {'; '.join(faults[:3])}{more}."
                " Give the weights that this model was loaded from."
            )
        seen = cls({own: tensors[name].detach() for own, name in found.items()})
        if isinstance(source, str | Path):
            seen._mapped = frozenset(found)
        elif isinstance(source, Reference):
            seen._dtypes = {own: source._dtypes[name] for own, name in found.items()}
            seen._mapped = frozenset(own for own, name in found.items() if name in source._mapped)
            seen._rounded_from = source._rounded_from
        return seen

    @classmethod
    def load(cls, source: "Source", layers: Sequence[Layer]) -> "Reference":
        """The reference weights of the given layers, checked for presence and shape, safe from any training.

        Args:
            source: A state dict, a module, another reference, or the path of a safetensors file (or of a folder that
                holds ``model.safetensors``). A file is mapped and a reference is shared; other sources are copied.
            layers: The layers that need a reference; a tied layer is found under any of its names.

        Raises:
            ReferenceMismatchError: A weight is missing or of another shape, or the file cannot be read.
        """
        return cls.view(source, layers).keep(layers, copy=not isinstance(source, Reference | str | Path))

    def __getitem__(self, name: str) -> Tensor:
        """The weights in the dtype that they were given in; a copy where they are stored in another."""
        return self._tensors[name].to(self._dtypes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def stored(self, name: str) -> Tensor:
        """The weights in the dtype that they are stored in."""
        return self._tensors[name]

    @property
    def rounded(self) -> bool:
        """Whether these are other numbers than the reference's, in a dtype that does not hold all of them."""
        return self._rounded_from is not None

    def part(self, names: Iterable[str]) -> "Reference":
        """The named weights alone, shared."""
        part = Reference({name: self._tensors[name] for name in names})
        part._dtypes = {name: self._dtypes[name] for name in part}
        part._mapped = self._mapped & part._tensors.keys()
        part._rounded_from = self._rounded_from
        return part

    def keep(
        self,
        layers: Sequence[Layer] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        copy: bool = True,
    ) -> "Reference":
        """A private copy in the narrowest dtype that is exact, of sharded layers only what belongs to this rank.

        Where the weights themselves are sharded, all ranks must call this together.

        Args:
            layers: Those of the weights.
            dtype: At most this wide, even where it is not exact (but for batch-norm scales under the authors'
                convention); the fingerprint stays that of the exact weights.
            device: ``None``: where they are. Sharded weights stay on the devices of their mesh.
            copy: ``False``: leave what has this dtype and device as it is, shared.
        """
        weights = {layer.name: layer.weight for layer in layers}
        exact = {n for la in layers if la.rows.kind == "scale" for n in (la.name, la.variance_name)}
        stored = {name: tensor.dtype for name, tensor in self._tensors.items()}
        if copy:
            stored = dict(zip(stored, _narrowest(list(self._tensors.values())), strict=True))
        wider = {n for n, d in stored.items() if dtype is not None and torch.promote_types(d, dtype) != dtype} - exact
        kept = self.part(self)
        for name, tensor in self._tensors.items():
            own = from_part(shard_like(tensor, w), w) if copy and (w := weights.get(name)) is not None else tensor
            where = own.device if device is None or is_sharded(own) else device
            moved = own.detach().to(dtype=dtype if name in wider else stored[name], device=where, copy=copy)
            if moved.device != tensor.device or moved.dtype != tensor.dtype:
                kept._mapped -= {name}
            kept._tensors[name] = moved
        kept._rounded_from = self.fingerprint() if wider else self._rounded_from
        return kept

    def beside(self, layer: Layer, device: torch.device | None = None) -> Tensor:
        """The stored reference of this rank's part of a layer's weight, with the weight's strides.

        It is stored in that form from now on, so that there is never a second copy of it. What is mapped from a file
        stays there, in the file's strides, as long as it is wanted on the CPU.

        Args:
            layer: One that this is the reference of.
            device: Where to; ``None``: beside the weight.
        """
        name, weight = layer.name, layer.weight
        own, W = shard_like(self._tensors[name], weight), local(weight)
        device = W.device if device is None else device
        if name in self._mapped and device == own.device:
            return own
        strides = torch.empty_like(W, device="meta").stride()
        if device != own.device or own.stride() != strides or not sharded_alike(self._tensors[name], weight):
            own = torch.empty_like(W, dtype=own.dtype, device=device).copy_(own)
            self._tensors[name] = from_part(own, weight)
            self._mapped -= {name}
        return own

    def nbytes(self) -> dict[str, int]:
        """What this process holds, in bytes, by type of device (``"cpu"``, ``"cuda"``) and ``"mapped"`` from a file."""
        total: dict[str, int] = {"mapped": 0}
        for name, tensor in self._tensors.items():
            part = local(tensor)
            where = "mapped" if name in self._mapped else part.device.type
            total[where] = total.get(where, 0) + part.numel() * part.element_size()
        return total

    def fingerprint(self, *, as_given: bool = False) -> str:
        """``"sha256:..."`` over names, shapes, dtypes and bytes, in the order of the names.

        Numbers of 16 bits count as float32, so that a checkpoint and the model that was loaded from it have one
        fingerprint, however either is stored. On sharded weights this is a collective call.

        Args:
            as_given: Count them in the dtype that they were given in, as tethertune 0.1 did.
        """
        if self._rounded_from is not None and not as_given:
            return self._rounded_from
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor, dtype = full(self._tensors[name]), self._dtypes[name]
            dtype = dtype if as_given else torch.promote_types(dtype, torch.float32)
            digest.update(f"{name} {tuple(tensor.shape)} {dtype}\n".encode())
            for part in stretches(tensor):
                wide = part.to("cpu", dtype).contiguous()
                digest.update(_bytes(wide))
        return f"sha256:{digest.hexdigest()}"


Source: TypeAlias = Reference | Mapping[str, Tensor] | nn.Module | str | Path
"""Where reference weights come from: a state dict, a module, or the path of a safetensors file or its folder."""


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {clean_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    tensors |= {clean_name(n): b for n, b in model.named_buffers() if n.endswith("running_var")}
    return tensors


def _open(source: Mapping[str, Tensor] | nn.Module | str | Path) -> dict[str, Tensor]:
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


def _narrowest(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    """The narrowest dtype that holds every number of each tensor, the same on all ranks that share one."""
    misses = [torch.tensor([not _holds(dtype, local(t)) for dtype in _NARROW]).int() for t in tensors]
    misses = [m.to(local(t).device) if is_sharded(t) else m for m, t in zip(misses, tensors, strict=True)]
    agreed = reduce_over_shards(misses, tensors, "max")
    return [
        next((d for d, misses in zip(_NARROW, flags.tolist(), strict=True) if not misses), t.dtype)
        for t, flags in zip(tensors, agreed, strict=True)
    ]


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    if dtype.itemsize >= tensor.element_size() or tensor.is_meta:
        return False
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in stretches(tensor.detach()))


def stretches(tensor: Tensor, size: int = _PART) -> list[Tensor]:
    """Views of stretches of axis 0 of about so many elements, so that what is made of each is small; none if empty."""
    tensor = tensor.unsqueeze(0) if tensor.ndim == 0 else tensor
    step = max(1, size * len(tensor) // max(1, tensor.numel()))
    return [tensor[start : start + step] for start in range(0, len(tensor), step)] if tensor.numel() else []


def _bytes(tensor: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """The bytes of a contiguous CPU tensor, which must outlive them, without a copy and without NumPy."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
