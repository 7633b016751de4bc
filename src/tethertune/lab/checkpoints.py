"""Weights from files that others wrote: safetensors, torch files without code, and folders that hold them.

A torch file is a pickle, and a pickle can run any program: such files are read with ``weights_only=True`` or refused.
"""

import argparse
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tethertune.errors import CheckpointError
from tethertune.rows import clean_name

__all__ = ["base_model", "difference", "load_state_dict", "locate", "metadata", "sha256"]

_FILES = ("model.safetensors", "pytorch_model.bin", "last/model.safetensors", "last/pytorch_model.bin")
_NESTINGS = ("state_dict", "model", "model_state_dict")
_SHOWN = 3


def locate(path: str | Path) -> Path:
    """The weights file itself: the path, or what the folder at the path holds.

    A folder is searched for ``model.safetensors`` (a tethertune run, timm, transformers, Accelerate) and
    ``pytorch_model.bin``, then for both inside ``last/``.

    Raises:
        CheckpointError: There is no such file, or no weights in the folder.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a checkpoint file, or a folder that holds one.")
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    if (path / "run.json").is_file():
        raise CheckpointError(
            f"{path} is a run without model.safetensors, so it is not finished: repeat its command, and it resumes."
        )
    if list(path.glob("*.index.json")):
        raise CheckpointError(f"{path} holds weights split over several files: save them as one model.safetensors.")
    raise CheckpointError(f"{path} holds none of {', '.join(_FILES)}: give the weights file itself.")


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file or folder, on the CPU, by parameter name.

    Training checkpoints that hold the weights under ``state_dict``, ``model`` or ``model_state_dict`` are unwrapped.
    Averaged (EMA) weights beside them are never taken in their place. Names lose what ``torch.compile`` and DDP put in
    front of them.

    Args:
        path: A safetensors file, a file written by ``torch.save``, or a folder (see :func:`locate`).

    Raises:
        CheckpointError: The file is missing, empty, truncated, no checkpoint, or a pickle that needs code to be read.
    """
    file = locate(path)
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty: copy or download it again.")
    tensors = _read_safetensors(file) if _is_safetensors(file) else _unwrap(_read_torch(file), file)
    return {clean_name(name): tensor for name, tensor in tensors.items()}


def metadata(path: str | Path) -> dict[str, str]:
    """The notes in the header of a safetensors file; empty for other files.

    A tethertune run notes ``base_model``, ``base_sha256``, ``head``, ``size``, ``method`` and more.

    Raises:
        CheckpointError: The file is missing, or not a whole safetensors file.
    """
    file = locate(path)
    if not _is_safetensors(file):
        return {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _broken(file, error) from error


def base_model(path: str | Path) -> str | None:
    """The name of the network that a checkpoint is of, if it says so.

    It does in the metadata of a tethertune run, and in the ``config.json`` of a folder that timm saved.

    Raises:
        CheckpointError: There is no such file, or it is damaged.
    """
    noted = metadata(path).get("base_model")
    if noted:
        return noted
    config = locate(path).with_name("config.json")
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


def sha256(path: str | Path) -> str:
    """The SHA-256 of the weights file, as 64 hexadecimal digits."""
    with locate(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """How two state dicts differ in names or shapes, as the end of a sentence; ``None`` if they do not.

    Example:
        >>> difference({"fc.weight": torch.ones(2)}, {"fc.weight": torch.ones(3), "fc.bias": torch.ones(3)})
        "'fc.bias' is missing"
    """
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    faults = []
    if missing:
        faults.append(f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if unknown:
        faults.append(f"{_listed(unknown)} {'is' if len(unknown) == 1 else 'are'} unknown")
    if not faults:
        other = [name for name in expected if given[name].shape != expected[name].shape]
        faults = [
            f"{name!r} has shape {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in other[:1]
        ]
    return " and ".join(faults) or None


def _listed(names: Iterable[str]) -> str:
    names = [repr(name) for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_safetensors(file: Path) -> bool:
    """By name or by content: eight bytes of length, then a JSON object."""
    with file.open("rb") as opened:
        return file.suffix == ".safetensors" or opened.read(9)[8:] == b"{"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise _broken(file, error) from error


def _read_torch(file: Path) -> Any:
    try:
        # timm's training checkpoints hold their arguments as a Namespace, which is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can surface as nearly any exception of the unpickler
        code = re.search(r"GLOBAL ([\w.]*\w) (?:was not an allowed|whose module)", str(error))
        if code:
            raise CheckpointError(
                f"{file} is a pickle that runs code to be read ({code[1]}), and is refused: load it yourself where you"
                " trust it, and save its state dict with safetensors.torch.save_file."
            ) from error
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, (UnpicklingError, LookupError)):  # a LookupError's text is the bare key
        reason = "it is not what torch.save writes"
    with file.open("rb") as opened:
        if opened.read(23) == b"version https://git-lfs":
            reason = "it is a Git LFS pointer, not the file itself"
    return CheckpointError(
        f"{file} is no checkpoint, or is damaged ({reason}): copy or download it again; it must be a safetensors"
        " file, or a state dict written by torch.save."
    )


def _unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint."""
    while isinstance(content, Mapping):
        nesting = next((key for key in _NESTINGS if isinstance(content.get(key), Mapping)), None)
        if nesting is None:
            break
        content = content[nesting]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state dict: save model.state_dict().")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    averaged = [str(key) for key in content if "ema" in str(key).lower().split("_")]
    if averaged:
        raise CheckpointError(
            f"{file} holds averaged weights only ({_listed(averaged)}): if you want those, save that entry to a file."
        )
    keys = _listed(map(str, content)) or "nothing"
    raise CheckpointError(f"{file} holds no weights (its entries: {keys}): save model.state_dict().")
