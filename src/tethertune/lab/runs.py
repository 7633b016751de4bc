"""Run folders: what training leaves and reports read, and nothing else passes between the two.

::

    runs/<task>/<model>/<method>/seed-<n>-<hash>/
        run.json            configuration, versions, machine, data, model, outcome
        metrics.jsonl       one line an epoch
        distances.json      how far each layer moved
        model.safetensors   the fine-tuned weights
        certificate.json    what its training images prove of it, once ``tethertune certify`` has been asked
        interpolations.json what it is on the way back to its reference, once ``tethertune interpolate`` has been asked
        alpha-<a>.safetensors  the weights there
        export-<form>/      the weights in a form that others load, once ``tethertune export`` has been asked
        README.md           model card
        resume/             state of an unfinished run; removed when it is complete

One process at a time owns a folder. Every file is whole or absent (:mod:`tethertune.lab.files`), and ``run.json`` says
``"complete"`` only after all the others are there.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from tethertune.errors import RunError, RunInUseError, TethertuneError
from tethertune.lab import files
from tethertune.lab.config import FinetuneConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CERTIFICATE", "INTERPOLATIONS", "Run", "RunFolder", "find", "load", "locked", "write_weights"]

CERTIFICATE = "certificate.json"
"""The file in a run folder that ``tethertune certify`` writes."""

INTERPOLATIONS = "interpolations.json"
"""The file in a run folder that ``tethertune interpolate`` writes."""

_LOCK = ".lock"
_FULL = {
    errno.ENOSPC: "is full: free some space",
    errno.EDQUOT: "is over its quota: free some space",
    errno.EFBIG: "takes no file that large: raise the limit (ulimit -f)",
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds, read.

    Attributes:
        path: The folder.
        info: ``run.json``.
        metrics: ``metrics.jsonl``, one dictionary an epoch; empty before the first epoch has ended.
        distances: ``distances.json``; empty until the run is complete.
        certificate: ``certificate.json``; empty until the run is certified.
        interpolations: ``interpolations.json``, by falling alpha; empty until the run is interpolated.
    """

    path: Path
    info: dict[str, Any]
    metrics: list[dict[str, Any]]
    distances: dict[str, Any]
    certificate: dict[str, Any] = field(default_factory=dict)
    interpolations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the run has ended with a result; else it can be resumed by the same command, or it diverged."""
        return bool(self.info["status"] == "complete")

    @property
    def diverged(self) -> bool:
        """Whether the run ended without a result, because its loss or a weight was no longer finite."""
        return bool(self.info["status"] == "diverged")

    @property
    def config(self) -> FinetuneConfig:
        """The configuration that the run was made from."""
        given: dict[str, Any] = {
            key: float(value) if value == "inf" else value for key, value in self.info["config"].items()
        }
        return FinetuneConfig(**given)


def load(path: str | Path) -> Run:
    """Read one run folder.

    Raises:
        RunError: There is no ``run.json``, or a file is not as this version writes it.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise RunError(f"{path} is not a run folder: it holds no run.json.")
    info = _read_json(path / "run.json")
    if not isinstance(info, dict) or info.get("schema") != 1 or "status" not in info:
        raise RunError(f"{path / 'run.json'} is not of a schema that this version reads (1): update tethertune.")
    distances, certificate, interpolations = (
        _read_json(path / name) if (path / name).is_file() else empty
        for name, empty in (("distances.json", {}), (CERTIFICATE, {}), (INTERPOLATIONS, []))
    )
    return Run(path, info, _read_lines(path / "metrics.jsonl"), distances, certificate, interpolations)


def find(paths: Iterable[str | Path]) -> list[Run]:
    """Every run in the given run folders, and in folders that hold run folders at any depth; sorted by path.

    Raises:
        RunError: A path that holds no run, or a run that cannot be read.
    """
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        folders = [file.parent for file in path.rglob("run.json")]
        if not folders:
            raise RunError(f"{path} holds no run: give run folders, or a folder above them such as runs/.")
        found |= {folder.resolve(): load(folder) for folder in folders}
    return [found[folder] for folder in sorted(found)]


class RunFolder:
    """The folder of one configuration, as the process that trains sees it.

    Args:
        config: The configuration, whose identity gives the folder its name.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.path = (
            Path(config.output)
            / _slug(config.task or config.data)
            / _slug(config.model)
            / config.method
            / f"seed-{config.seed}-{config.hash}"
        )

    def status(self) -> Literal["absent", "running", "diverged", "complete"]:
        """How far the run is; one that diverged would do so again.

        Raises:
            RunError: The folder holds the run of another configuration.
        """
        if not (self.path / "run.json").is_file():
            return "absent"
        run = load(self.path)
        if run.info.get("hash") != self.config.hash:
            raise RunError(
                f"{self.path} holds a run of another configuration ({run.info.get('hash')}, this is"
                f" {self.config.hash}): choose another --output, or start anew with --fresh."
            )
        status: Literal["running", "diverged", "complete"] = run.info["status"]
        return status

    @contextmanager
    def own(self, *, fresh: bool = False) -> Iterator[None]:
        """Hold the folder for this process: lock it, clear what killed processes left, and unlock it at the end.

        Inside, an operating-system error that means a full or read-only disk becomes a :exc:`RunError`.

        Args:
            fresh: Delete the run that is there and start anew.

        Raises:
            RunInUseError: Another process holds the folder.
            RunError: It belongs to another configuration, or it cannot be written.
        """
        with self._told_plainly(), locked(self.path):
            if fresh:
                self._clear()
            self.status()
            files.remove_strays(self.path)
            if self.states.is_dir():
                files.remove_strays(self.states)
            yield

    def require_space(self, needed: int) -> None:
        """Check, before anything is written, that the disk has room.

        Args:
            needed: Bytes that the run will hold at most.

        Raises:
            RunError: Less than that is free.
        """
        there = self.path
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if free < needed:
            raise RunError(
                f"The disk of {there} has {free / 1e6:.0f} MB free, and this run needs up to {needed / 1e6:.0f} MB:"
                " free some, or choose another --output."
            )

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        files.write_json(self.path / "run.json", info)

    def write_metrics(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Write ``metrics.jsonl`` whole, so that a resumed run loses the epochs that it repeats."""
        lines = (json.dumps(line, allow_nan=False) + "\n" for line in metrics)
        files.write_text(self.path / "metrics.jsonl", "".join(lines))

    def write_distances(self, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write ``distances.json``."""
        files.write_json(self.path / "distances.json", {"layers": layers})

    def write_card(self, text: str) -> None:
        """Write the model card, ``README.md``."""
        files.write_text(self.path / "README.md", text)

    def write_weights(self, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
        """Write ``model.safetensors``; equal weights and metadata make equal bytes."""
        write_weights(self.path / "model.safetensors", tensors, metadata)

    def save_state(self, state: Mapping[str, Any], step: int) -> None:
        """Keep the state of an unfinished run, in place of the one before.

        Args:
            state: Tensors, numbers, text, and containers of them.
            step: The optimiser steps done.
        """
        import torch

        path = self.states / f"step-{step}.pt"
        with files.atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
        for other in self._states():
            if other != path:
                other.unlink()

    def load_state(self) -> dict[str, Any] | None:
        """The newest state that was kept, on the CPU; ``None`` before the first.

        Raises:
            RunError: The file cannot be read.
        """
        import torch

        states = self._states()
        if not states:
            return None
        try:
            state = torch.load(states[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises what the damaged byte happens to break
            raise RunError(f"{states[-1]} cannot be read ({error}): start the run anew with --fresh.") from error
        return dict(state)

    def has_leftovers(self) -> bool:
        """Whether a lock or states are there, of a process that is at work or was killed."""
        return (self.path / _LOCK).exists() or self.states.exists()

    def drop_states(self) -> None:
        """Remove ``resume/``."""
        shutil.rmtree(self.states, ignore_errors=True)

    @property
    def states(self) -> Path:
        """The folder of what an unfinished run needs to go on."""
        return self.path / "resume"

    def _states(self) -> list[Path]:
        return sorted(self.states.glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")))

    def _clear(self) -> None:
        self.drop_states()
        names = ("run.json", "metrics.jsonl", "distances.json", "model.safetensors", "README.md", CERTIFICATE)
        for path in (*(self.path / name for name in (*names, INTERPOLATIONS)), *self.path.glob("alpha-*.safetensors")):
            path.unlink(missing_ok=True)
        for path in self.path.glob("export-*"):
            shutil.rmtree(path)

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        try:
            yield
        except TethertuneError:
            raise
        except Exception as error:
            cause = _os_error(error)
            if cause in _FULL:
                raise RunError(
                    f"The disk of {self.path} {_FULL[cause]} and give the same command again; the run resumes where"
                    " its last state was saved."
                ) from error
            if cause in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise RunError(
                    f"{self.path} cannot be written ({os.strerror(cause)}): choose another --output."
                ) from error
            raise


def write_weights(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; equal weights and metadata make equal bytes."""
    from safetensors.torch import save_file

    with files.atomic_path(path) as temporary:
        save_file(_unshared(tensors), temporary, {"format": "pt", **metadata})
        _sort_metadata(temporary)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, for this process; the system frees it when the process ends, however it ends.

    Raises:
        RunInUseError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.close()


def _lock(folder: Path) -> TextIO:
    """Lock a folder by a file in it; the system unlocks it when this process ends, however it ends.

    Raises:
        RunInUseError: Another process holds the lock.
    """
    path = folder / _LOCK
    while True:
        lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise RunInUseError(
                f"{folder} is in use by {owner}: wait for it, or give another --seed or --output."
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
        lock.close()  # the file was removed by its last owner between opening and locking
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _os_error(error: BaseException) -> int | None:
    """The number of the operating-system error that an exception carries, was raised after, or tells of."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if told := re.search(r"\(os error (\d+)\)", str(seen)):  # safetensors' errors are not OSErrors
            return int(told[1])
        seen = seen.__cause__ or seen.__context__
    return None


def _slug(name: str) -> str:
    """A folder name: the last part of a path, or a name with only letters, digits and ``._-``."""
    last = Path(name).resolve().name if Path(name).exists() else name
    return re.sub(r"[^\w.-]+", "-", last.removesuffix(".safetensors")).strip("-.") or "unnamed"


def _unshared(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Contiguous CPU tensors, each with memory of its own, as safetensors asks for."""
    result: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        result[name] = plain.clone() if plain.data_ptr() in used else plain
        used.add(plain.data_ptr())
    return result


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header; the library writes them in an order that differs by process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): make the run anew with --fresh, or leave it out.") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): make the run anew with --fresh, or leave it out.") from error
