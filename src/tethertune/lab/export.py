"""A finished run in the form that others load, inside the run's balls in the dtype of the file.

Rounding to a dtype of fewer digits moves weights, and can leave the balls. So the cast weights are projected around the
same reference in their own dtype, and every distance is measured in float64 from the numbers that are written.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import join
from typing import Any

import torch
from torch import nn

from tethertune import measure
from tethertune.constraint import Constraint, Distance
from tethertune.errors import ConfigurationError, NonFiniteWeightError, RunError
from tethertune.lab import card, checkpoints, files, inputs, record, regularisers, runs
from tethertune.lab.formats import FORMATS, Exported
from tethertune.lab.models import LoadedModel
from tethertune.lab.runs import Run
from tethertune.reference import Reference

__all__ = ["DTYPES", "export"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(run: str | Path, to: str, *, dtype: str = "float32", output: str | Path | None = None) -> Path:
    """Write a finished run for others, with a model card and the distances of what is written.

    Args:
        run: The run folder.
        to: A key of :data:`tethertune.lab.formats.FORMATS`.
        dtype: A key of :data:`DTYPES`, that of all floating-point numbers in the file.
        output: The folder to write; ``None``: ``export-<to>`` or ``export-<to>-<dtype>`` in the run's.

    Returns:
        The folder.

    Raises:
        ConfigurationError: The form does not fit the network, a ball holds no number of the dtype, a weight is too
            large for it, or the folder is there already.
        CheckpointError: Weights cannot be read.
        RunError: The run is not complete or keeps no weights, or its pre-trained weights have changed.
        MissingExtraError: A package that the form needs is not installed.
    """
    loaded_run = runs.load(run)
    place = Path(output) if output is not None else loaded_run.path / _folder_name(to, dtype)
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise ConfigurationError(f"{place} is there already: remove it, or choose another --output.")
    loaded, reference, constraint = _rebuilt(loaded_run)
    held = _cast(loaded.model, dtype, constraint)
    config = loaded_run.config
    moved = measure.distances(loaded.model, reference, head=loaded.head, convention=config.convention)
    layers = record.layers(moved, held)
    exported = Exported(loaded_run, loaded, checkpoints.metadata(loaded_run.path) | {"dtype": dtype})
    with files.atomic_path(place) as folder:
        folder.mkdir()
        FORMATS[to].write(folder, exported)
        files.write_json(folder / "distances.json", {"layers": layers})
        about = _about(exported, to, dtype, {} if held is None else held.distances(), folder)
        text = card.write(config, loaded_run.info, layers, library=FORMATS[to].library, file=about)
        files.write_text(folder / "README.md", text)
    return place


def _folder_name(to: str, dtype: str) -> str:
    return f"export-{to}" if dtype == "float32" else f"export-{to}-{dtype}"


def _rebuilt(run: Run) -> tuple[LoadedModel, Reference, Constraint | None]:
    """The network with the weights of a run, the ones it was trained from, and its balls; without its images.

    Raises:
        RunError: The run is not complete or keeps no weights, or its pre-trained weights have changed.
    """
    if not run.complete:
        raise RunError(f"{run.path} is not complete: give the command of the run again, it resumes.")
    if not (run.path / "model.safetensors").is_file():
        raise RunError(f"{run.path} keeps no weights, as the trials of a search do: give another run.")
    loaded = inputs.network(run.config, classes=len(run.info["data"]["classes"]))
    then, now = run.info["model"]["weights_sha256"], loaded.weights_sha256
    if then != now:
        raise RunError(
            f"{run.path} was trained from other pre-trained weights than there are now ({then}, now {now}): bring"
            " those back."
        )
    reference = Reference.of(loaded.model)
    constraint = regularisers.build(run.config, loaded, reference).constraint
    loaded.model.load_state_dict(checkpoints.load_state_dict(run.path))
    return replace(loaded, model=loaded.model.eval().requires_grad_(requires_grad=False)), reference, constraint


def _cast(network: nn.Module, dtype: str, constraint: Constraint | None) -> Constraint | None:
    """Bring a network into a dtype, inside the balls; gives the constraint that holds it there.

    Raises:
        ConfigurationError: A ball holds no number of the dtype, or a weight is too large for it.
        NonFiniteWeightError: A distance is larger than its radius after all.
    """
    network.to(DTYPES[dtype])
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigurationError(f"--dtype {dtype} cannot hold {name}, which has larger numbers: use bfloat16.")
    if constraint is None:
        return None
    try:
        held = constraint.on(network)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"--dtype {dtype} cannot keep the promise of this run, use float32. {error}"
        ) from error
    held.project()
    outside = [name for name, found in held.distances().items() if not found.value <= found.radius]
    if outside:
        raise NonFiniteWeightError(f"{outside[0]} is outside its ball in {dtype}, so nothing was written.")
    return held


def _about(exported: Exported, to: str, dtype: str, balls: Mapping[str, Distance], folder: Path) -> str:
    """What the model card says of the file."""
    form, info = FORMATS[to], exported.run.info
    command = join(["tethertune", "export", str(exported.run.path), "--to", to, "--dtype", dtype])
    digest = checkpoints.sha256(folder / form.file)
    paragraphs = [
        f"`{form.file}`, SHA-256 `{digest}`, holds the weights in {dtype}. Inside this folder, load it with",
        f"```python\n{form.usage(exported)}\n```",
        _promise(info, dtype, balls),
    ]
    if dtype != "float32":
        paragraphs.append(f"The accuracies below are those of the run in float32, before its weights became {dtype}.")
    if to == "onnx":
        paragraphs.append(
            "Batch normalisation is not folded into the convolutions: every weight is in the file under its name, and"
            " the distances are of those. A runtime may fold it in memory when it loads the file."
        )
    paragraphs.append(f"Made after the run below by\n\n```\n{command}\n```")
    return "## This file\n\n" + "\n\n".join(paragraphs) + "\n"


def _promise(info: Mapping[str, Any], dtype: str, balls: Mapping[str, Distance]) -> str:
    method = info["config"]["method"]
    if not balls:
        return f"The method {method} has no radii: the distances below are measured, and nothing is promised of them."
    largest = max((found.value / found.radius for found in balls.values() if found.radius), default=0.0)
    return (
        f"The promise holds in this file: each of the {len(balls)} layers with a radius is within it, as computed in"
        f" float64 from the {dtype} numbers; the farthest has gone {largest:.4%} of its radius."
    )
