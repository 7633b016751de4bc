"""Run folders in the schema that training writes, made from a few numbers so that what a report must say is known."""

import json
import math
from pathlib import Path

import pytest

from tethertune.lab.config import FinetuneConfig
from tethertune.lab.methods import METHODS

LAYERS = 12


class Folders:
    """Writes run folders below a root."""

    def __init__(self, root: Path):
        self.root = root

    def add(
        self,
        accuracy: float | None,
        *,
        method: str = "none",
        seed: int = 1,
        status: str = "complete",
        data: str = "fashion",
        classes: tuple[str, ...] = ("bag", "boot"),
        place: str = "",
        fingerprint: str = "sha256:0123456789abcdef",
        model: str = "lite0",
        part: dict | None = None,
        validation: float | None = None,
        retention: float | None = None,
        alpha: float = 1.0,
        before_interpolation: dict | None = None,
        gradients: tuple[float, float | None] | None = None,
        sizes: tuple[int, int, int] = (100, 300, 1000),
        **options,
    ) -> Path:
        """Write a run folder.

        Args:
            accuracy: On the test images; a trial has none.
            validation: On the validation images; not given: the same.
            part: What the run is part of.
            retention: Share of the pre-trained answers that stay.
            gradients: Norms of the data's and of the penalty's gradient at the first epoch; they halve with each epoch.
                With them the test accuracy is measured by epoch, as the paper's Figure 1 draws both.
            options: Configuration.
        """
        config = FinetuneConfig(model=model, data=data, method=method, seed=seed, **{"epochs": 4, **options})
        folder = self.root / place / data / model.replace(":", "-") / method / f"seed-{seed}-{config.hash}"
        folder.mkdir(parents=True)
        validated = accuracy if validation is None else validation
        outcome = {
            "test_accuracy": accuracy,
            "test_loss": 0.7,
            "validation_accuracy": validated,
            "train_accuracy": 1.0,
            "epochs": 4,
            "steps": 20,
            "seconds": 20.0 + seed,
            "images_per_second": 31.5,
            "peak_memory_bytes": 900 * 2**20,
            "at_radius": None,
            "retention": retained(retention),
            "alpha": alpha,
            "before_interpolation": before_interpolation,
        }
        info = {
            "schema": 1,
            "status": status,
            "hash": config.hash,
            "command": config.command(),
            "config": config.to_dict(),
            "task": config.task,
            "part": part,
            "versions": {"tethertune": "0.1.0", "python": "3.11.7", "torch": "2.15.0"},
            "machine": {
                "platform": "Linux",
                "processor": "x86",
                "cores": 2,
                "threads": 1,
                "device": "cpu",
                "memory_bytes": 8 * 2**30,
            },
            "data": {
                "name": data,
                "classes": list(classes),
                "sizes": dict(zip(("train", "validation", "test"), sizes, strict=True)),
                "fingerprint": fingerprint,
            },
            "model": {
                "name": model,
                "source": "a wheel",
                "weights_sha256": "ab" * 32,
                "head": "classifier",
                "size": 48,
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "interpolation": "bilinear",
                "parameters": 3_400_000,
            },
            "constraint": {"summary": "12 of 40 tensors constrained"} if method.endswith("pgm") else None,
            "outcome": outcome if status == "complete" else None,
        }
        write = (folder / "run.json").write_text
        write(json.dumps(info))
        reached = 0.5 if validated is None else validated
        data_gradient, penalty_gradient = gradients or (None, None)
        lines = [
            {
                "epoch": epoch,
                "step": 5 * epoch,
                "loss": None if validated is None else 2.0 / epoch,
                "accuracy": min(1.0, 0.3 * epoch),
                "validation_accuracy": None if validated is None else reached * (1 - 0.5**epoch),
                **({"test_accuracy": accuracy * epoch / 4} if gradients and accuracy else {}),
                "seconds": 1.0,
                "data_gradient": data_gradient and data_gradient * 0.5 ** (epoch - 1),
                "penalty_gradient": penalty_gradient and penalty_gradient * 0.5 ** (epoch - 1),
                "full_gradient": data_gradient and (data_gradient + (penalty_gradient or 0)) * 0.5 ** (epoch - 1),
                "retention": retention and 1 - (1 - retention) * epoch / 4,
            }
            for epoch in range(1, 5)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if status == "complete":
            (folder / "distances.json").write_text(json.dumps({"layers": dict(layers(config))}))
        return folder


def retained(share: float | None) -> dict | None:
    """The outcome of a measurement of retention."""
    return share and {"share": share, "cross_entropy": 1.9, "confident": 411, "images": 439}


def layers(config: FinetuneConfig):
    """Layers that would move by 0.002 to 0.1 of their own norm, pulled back to the radius where there is one."""
    norm = METHODS[config.method].norm if METHODS[config.method].kind == "constraint" else None
    for place in range(LAYERS):
        reference = {"mars": 4.0 + 2 * place, "frobenius": 1.0 + place / 2}
        moved = {key: 0.002 * 50 ** (place / (LAYERS - 1)) * size for key, size in reference.items()}
        radius = None
        if norm and config.radius is not None and math.isfinite(config.radius):
            radius = config.radius
        elif norm and config.relative_radius is not None:
            radius = config.relative_radius * reference[norm]
        active = radius is not None and moved[norm] >= radius
        scale = radius / moved[norm] if active else 1.0
        yield (
            f"blocks.{place}.weight",
            {
                "role": "body",
                "rows": 8,
                "columns": 16,
                **{key: value * scale for key, value in moved.items()},
                **{f"reference_{key}": value for key, value in reference.items()},
                "norm": norm if radius is not None else None,
                "radius": radius,
                "value": None if radius is None else min(moved[norm], radius),
                "active_rows": None if radius is None else 2 * active,
            },
        )
    yield (
        "classifier.weight",
        {"role": "head", "rows": 2, "columns": 16, "mars": 3.0, "frobenius": 1.0, "reference_mars": 0.0,
         "reference_frobenius": 0.0, "norm": None, "radius": None, "value": None, "active_rows": None},
    )  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "runs")


DEMO = {
    "none": (0.667, 0.716, 0.747),
    "l2-sp": (0.699, 0.761, 0.721),
    "mars-sp": (0.688, 0.757, 0.730),
    "delta": (0.705, 0.734, 0.716),
    "l2-pgm": (0.710, 0.762, 0.779),
    "mars-pgm": (0.711, 0.781, 0.777),
}
"""Accuracies of seeds 1 to 3 that were once measured on Fashion-MNIST."""


@pytest.fixture
def demo(folders):
    """Six methods with three seeds each, and plain fine-tuning with another head and learning rate."""
    for method, accuracies in DEMO.items():
        for seed, accuracy in enumerate(accuracies, start=1):
            folders.add(accuracy, method=method, seed=seed, head="flatten", lr=5e-4)
    for seed, accuracy in enumerate((0.723, 0.775, 0.780), start=1):
        folders.add(accuracy, seed=seed, head="pool", lr=3e-4)
    return folders


def certificate():
    """The part of ``certificate.json`` that the report reads."""
    layers = [
        {"name": f"blocks.{j}", "reference": 2.0, "distance": j / 10, "share": j / 3, "distance_elasticity": j / 4}
        for j in range(3)
    ]
    printed = {"name": "Theorem 2 (as printed)", "about": "complexity", "kind": "printed"}
    comparison = [
        {**printed, "log10": 4.25},
        {**printed, "name": "Theorem 3 (as printed)", "log10": None},
        {"name": "distance bound", "log10": -0.5, "about": "complexity", "kind": "certificate"},
    ]
    return {
        "schema": 1,
        "certificate": {
            "delta": 0.05,
            "samples": 34006,
            "loss": "ramp (margin 2)",
            "empirical_loss": 0.25,
            "gap": 0.4321,
            "total": 0.6821,
            "vacuous": False,
            "loss_range": 1.0,
            "mode": "declared",
            "confidence": 0.03,
            "layers": layers,
            "comparison": comparison,
        },
    }


@pytest.fixture
def certified(folders):
    """One run of ``none``, and one of ``mars-pgm`` that is certified."""
    folders.add(0.7, seed=1)
    folder = folders.add(0.75, method="mars-pgm", seed=1, relative_radius=0.02)
    (folder / "certificate.json").write_text(json.dumps(certificate()))
    return folders


@pytest.fixture
def whole(folders):
    """Two tasks with everything that a report shows: searches, sweeps, gradients, retention, interpolations."""
    for task, gain in (("pets", 0.0), ("flowers", 0.05)):
        for method, accuracy, values in (("none", 0.7, {}), ("mars-pgm", 0.75, {"radius": 0.3, "head_radius": 3.0})):
            _add_cell(folders, task, method, accuracy + gain, values)
    return folders


def _add_cell(folders, task, method, accuracy, values):
    shared = {"method": method, "data": task, "model": "resnet101"}
    for seed in (1, 2, 3):
        folder = folders.add(
            accuracy + 0.01 * seed, seed=seed, retention=0.4, gradients=(2.0, 0.0), place="runs", **values, **shared
        )
        between = {"alpha": 0.5, "test_accuracy": accuracy - 0.05, "retention": retained(0.7)}
        (folder / "interpolations.json").write_text(json.dumps([between]))
    for number, rate in enumerate((1e-4, 1e-3)):
        trial = {"kind": "trial", "study": f"{task}-{method}", "number": number}
        folders.add(None, validation=accuracy, part=trial, place="trials", **values, **shared, lr=rate)
        sweep = {"kind": "sweep", "key": "lr", "value": rate}
        folders.add(accuracy, part=sweep, place="sweeps", **values, **shared, lr=rate)
    for value in (0.1, 10.0) if values else ():
        sweep = {"kind": "sweep", "key": "strengths", "value": value}
        multiplied = {name: value * radius for name, radius in values.items()}
        folders.add(accuracy, part=sweep, place="sweeps", **multiplied, **shared)
