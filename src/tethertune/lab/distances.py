"""How far two checkpoints of one network lie apart, layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tethertune import measure
from tethertune.errors import CheckpointError, ConfigurationError, ReferenceMismatchError
from tethertune.lab import checkpoints
from tethertune.measure import Displacement
from tethertune.rows import Convention, Rows

if TYPE_CHECKING:
    from tethertune.lab.architectures import Architecture, WeightsFile

__all__ = ["Comparison", "centre", "compare"]


@dataclass(frozen=True)
class Comparison:
    """The distances of a checkpoint from a reference.

    Attributes:
        checkpoint: What was measured.
        reference: What it was measured from.
        rows: How weights were cut into rows, in words.
        layers: The displacement of each layer by the name of its weight.
    """

    checkpoint: str
    reference: str
    rows: str
    layers: dict[str, Displacement]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``null`` for what is not finite, and for distances relative to a centre that is 0."""
        layers = {
            name: {
                **{key: _finite(value) for key, value in asdict(layer).items()},
                "relative_mars": relative(layer.mars, layer.reference_mars),
                "relative_frobenius": relative(layer.frobenius, layer.reference_frobenius),
            }
            for name, layer in self.layers.items()
        }
        return {"checkpoint": self.checkpoint, "reference": self.reference, "rows": self.rows, "layers": layers}


def relative(distance: float, reference: float) -> float | None:
    """A distance as a multiple of the reference's own norm; ``None`` where that is 0."""
    return _finite(distance / reference) if reference else None


def compare(
    checkpoint: str | Path,
    reference: str | Path | None = None,
    *,
    arch: str | None = None,
    convention: Convention = "operator",
) -> Comparison:
    """Measure how far each layer of a checkpoint is from the same layer of another.

    The head is measured from 0 where the reference has none of its shape, as pre-trained weights have not.

    Args:
        checkpoint: A file or folder (see :func:`tethertune.lab.checkpoints.load_state_dict`).
        reference: Another one, or the name of a network for its published weights; ``None``: the weights that the run
            in ``checkpoint`` was trained from.
        arch: Name of the network, whose modules tell how weights are cut into rows. ``None``: what the checkpoint
            says; if it says nothing, axis 0 of every weight with two or more axes numbers its rows.
        convention: ``"operator"`` or ``"authors"``; see :mod:`tethertune.rows`.

    Raises:
        CheckpointError: A file cannot be read, or is not of the network ``arch``.
        ReferenceMismatchError: The checkpoints are of different networks.
        ConfigurationError: There is no reference, or no network where one is needed.
    """
    state = checkpoints.load_state_dict(checkpoint)
    noted = checkpoints.metadata(checkpoint)
    arch = arch or checkpoints.base_model(checkpoint)
    origin, source = centre(checkpoint, reference, arch)
    if arch is None:
        if convention != "operator":
            raise ConfigurationError(f"convention={convention!r} needs the types of the modules: add --arch NAME.")
        words = "axis 0 of every weight with two or more axes, as the network is not known (--arch NAME names it)"
        layers = _by_axis(state, origin, f"{source} is not of the same network as {checkpoint}")
    else:
        words = f"by the types of the modules of {arch}, {convention} convention"
        size = int(noted["size"]) if "size" in noted else None
        try:
            layers = _by_module(state, origin, arch, size, convention)
        except (CheckpointError, ReferenceMismatchError) as error:
            raise type(error)(f"{checkpoint}, measured from {source}: {error}") from error
    return Comparison(str(checkpoint), source, words, layers)


def centre(checkpoint: str | Path, reference: str | Path | None, arch: str | None) -> tuple[dict[str, Tensor], str]:
    """The weights that a checkpoint's distances are from, by the network's own names, and the words for their origin.

    Args:
        checkpoint: A file or folder.
        reference: Another one, the name of a network for its published weights, or ``None`` for what the checkpoint
            says of itself.
        arch: Name of the checkpoint's network, where it is known.

    Raises:
        CheckpointError: The weights cannot be read, or are not those that the checkpoint was trained from.
        ConfigurationError: An unknown name, or a checkpoint that does not say what it was trained from.
    """
    noted = checkpoints.metadata(checkpoint)
    if reference is not None and Path(reference).exists():
        return checkpoints.load_state_dict(reference), str(reference)
    name = noted.get("base_model") if reference is None else str(reference)
    if name is None:
        raise ConfigurationError(f"{checkpoint} does not say what it was trained from: add --reference CHECKPOINT.")
    from tethertune.lab import architectures

    architecture = architectures.find(name)
    weights = architecture.published() if reference is not None else _base(checkpoint, architecture, noted)
    size = int(noted["size"]) if "size" in noted and arch == name else None
    model = architecture.build(2, size, checkpoints.load_state_dict(weights.path))
    head = architecture.head(model)
    body = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{head}.")}
    return body, f"{name} ({weights.source})"


def _base(checkpoint: str | Path, architecture: "Architecture", noted: Mapping[str, str]) -> "WeightsFile":
    """The weights that a run was trained from, by their hash: the file it names, or the published ones."""
    from tethertune.lab.architectures import WeightsFile

    source, wanted = noted.get("base_source", ""), noted.get("base_sha256", "")
    given = WeightsFile(Path(source), source)
    weights = given if source and given.path.exists() else architecture.published()
    if checkpoints.sha256(weights.path) != wanted:
        raise CheckpointError(
            f"{checkpoint} was trained from {source or 'other weights'} (SHA-256 {wanted[:8] or 'none'}), not from"
            f" {weights.source}: give the weights it was trained from with --reference."
        )
    return weights


def _by_module(
    state: Mapping[str, Tensor], centre: Mapping[str, Tensor], arch: str, size: int | None, convention: Convention
) -> dict[str, Displacement]:
    from tethertune.lab import architectures, models

    centre = architectures.find(arch).native(centre)
    model, head = models.assemble(arch, state, size=size)
    weight = f"{head}.weight"
    same_head = weight in centre and centre[weight].shape == model.get_parameter(weight).shape
    return measure.distances(model, centre, head=None if same_head else head, convention=convention)


def _by_axis(state: Mapping[str, Tensor], centre: Mapping[str, Tensor], refusal: str) -> dict[str, Displacement]:
    fault = checkpoints.difference(centre, state)
    if fault:
        raise ReferenceMismatchError(f"{refusal}: {fault}. If only the head differs, --arch NAME lets it.")
    cut = Rows("map")
    return {
        name: measure.of_matrices(weight, centre[name], cut)
        for name, weight in state.items()
        if weight.ndim >= 2 and weight.is_floating_point()
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
