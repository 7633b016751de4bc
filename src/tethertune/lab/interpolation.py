"""A finished run on its way back to the reference: accuracy on the new task, and what it has forgotten, at each place.

The line itself is :mod:`tethertune.lab.wiseft`; this module takes a run folder apart, measures, and keeps what it found
in the folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tethertune.errors import ConfigurationError, RunError
from tethertune.lab import checkpoints, files, runs, training
from tethertune.lab.retention import Kept
from tethertune.lab.runs import Run
from tethertune.lab.training import Training

__all__ = ["ALPHAS", "Interpolation", "measure"]

ALPHAS = (0.75, 0.5, 0.25)
"""The places that are measured by default."""


@dataclass(frozen=True)
class Interpolation:
    """A network between a run's reference and its trained weights.

    Attributes:
        alpha: Its place: 0 is the pre-trained body under the trained head, 1 the run as it ended.
        test_accuracy: On the run's test images.
        validation_accuracy: On the run's validation images.
        retention: What it has kept; ``None`` if no images are to be retained.
        retain: The folder of these images.
    """

    alpha: float
    test_accuracy: float
    validation_accuracy: float
    retention: Kept | None = None
    retain: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"retention": None if self.retention is None else self.retention.to_dict()}


def measure(
    run: str | Path,
    alphas: Sequence[float] = ALPHAS,
    *,
    retain: str | None = None,
    retain_size: int | None = None,
    save: bool = False,
    output: str | Path | None = None,
) -> list[Interpolation]:
    """Interpolate a finished run towards its reference, and keep in its folder what comes out.

    Every network is inside the balls of the run: it is projected, though by convexity only rounding could leave them.

    Args:
        run: The run folder.
        alphas: Places between the reference, 0, and the trained weights, 1.
        retain: Images to retain, as in ``tethertune finetune``; ``None``: those of the run, if it has any.
        retain_size: Side of those images in pixels; ``None``: that of the run, or the network's own for other images.
        save: Write the weights of each place to ``alpha-<alpha>.safetensors``.
        output: Folder for these; ``None``: the run's.

    Returns:
        What was found, in the order of the alphas. It is merged into ``interpolations.json``, by alpha.

    Raises:
        ConfigurationError: An alpha outside of [0, 1], or a size without images.
        CheckpointError: Weights cannot be read, or the pre-trained ones come without their classifier.
        DataError: Images cannot be used.
        RunError: The run is not complete or keeps no weights, or its images or pre-trained weights have changed.
    """
    wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if wrong or not alphas:
        given = f"--alpha {wrong[0]}" if wrong else "no alpha"
        raise ConfigurationError(f"{given} is not allowed: give numbers from 0 (the reference) to 1 (the run).")
    loaded = runs.load(run)
    if loaded.complete and not (loaded.path / "model.safetensors").is_file():
        raise RunError(f"{loaded.path} keeps no weights, as the trials of a search do: give another run.")
    found = list(_measured(loaded, alphas, _changes(retain, retain_size), _place(loaded, save, output)))
    _keep(loaded, found)
    return found


def _changes(retain: str | None, retain_size: int | None) -> dict[str, Any]:
    """What is other than in the run's configuration: the images to retain, and that nothing is chosen."""
    changes: dict[str, Any] = {"keep": None}
    if retain is not None:
        return changes | {"retain": retain, "retain_size": retain_size}
    return changes if retain_size is None else changes | {"retain_size": retain_size}


def _place(run: Run, save: bool, output: str | Path | None) -> Path | None:
    """Where weights are written to, if they are."""
    if not save:
        return None
    return run.path if output is None else Path(output)


def _measured(
    run: Run, alphas: Sequence[float], changes: dict[str, Any], place: Path | None
) -> Iterator[Interpolation]:
    with training.rebuilt(run, **changes) as rebuilt:
        trained, notes = checkpoints.load_state_dict(run.path), checkpoints.metadata(run.path)
        line = rebuilt.line_from_here()
        for alpha in alphas:
            line.go(trained, alpha)
            yield _interpolation(rebuilt, float(alpha))
            if place is not None:
                weights = rebuilt.network.state_dict()
                runs.write_weights(place / f"alpha-{float(alpha)}.safetensors", weights, notes | {"alpha": str(alpha)})


def _interpolation(rebuilt: Training, alpha: float) -> Interpolation:
    """What the network is like as it is now."""
    _, test_accuracy = rebuilt.evaluate(rebuilt.dataset.test)
    _, validation_accuracy = rebuilt.evaluate(rebuilt.dataset.validation)
    kept = None if rebuilt.retention is None else rebuilt.retention.measure(rebuilt.network)
    return Interpolation(alpha, test_accuracy, validation_accuracy, kept, rebuilt.config.retain)


def _keep(run: Run, found: Sequence[Interpolation]) -> None:
    """Merge what was found into the file of the run; what was not measured now stays as it was known."""
    with runs.locked(run.path):
        known = {entry["alpha"]: entry for entry in runs.load(run.path).interpolations}
        for entry in found:
            measured = {key: value for key, value in entry.to_dict().items() if value is not None}
            known[entry.alpha] = {**entry.to_dict(), **known.get(entry.alpha, {}), **measured}
        files.write_json(run.path / runs.INTERPOLATIONS, [known[alpha] for alpha in sorted(known, reverse=True)])
