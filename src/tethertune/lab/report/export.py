"""The report's numbers as one JSON document, for whoever computes with them, and to be kept beside what is written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tethertune.lab.report import frontier
from tethertune.lab.report.grouping import Comparison, Group, Setting, outcome, part
from tethertune.lab.report.statistics import Difference
from tethertune.lab.runs import Run

__all__ = ["document"]


def document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Every task with its settings, methods, values, accuracies by seed, differences, curves and interpolations.

    Accuracies and shares are fractions; what is not finite is ``None``.
    """
    return {"schema": 1, "tasks": [_task(comparison) for comparison in comparisons]}


def _task(comparison: Comparison) -> dict[str, Any]:
    runs = [run for group in comparison.groups for run in group.runs.values()]
    data: Mapping[str, Any] = runs[0].info["data"] if runs else {}
    return {
        "task": comparison.dataset,
        "model": comparison.model,
        "data": {key: data.get(key) for key in ("name", "sizes", "split", "fingerprint")},
        "trials": len(comparison.trials),
        "unfinished": len(comparison.unfinished),
        "settings": [_setting(comparison, setting) for setting in comparison.settings],
        "sweeps": sorted((_swept(run) for run in comparison.sweeps), key=lambda point: [*map(str, point.values())]),
    }


def _setting(comparison: Comparison, setting: Setting) -> dict[str, Any]:
    on = frontier.images(setting.groups)
    return {
        "options": dict(setting.fields),
        "methods": [_group(comparison, setting, group, on) for group in setting.groups],
    }


def _group(comparison: Comparison, setting: Setting, group: Group, on: frontier.Images | None) -> dict[str, Any]:
    rival = setting.rival(group)
    return {
        "method": group.method,
        "values": {**group.strengths, **group.rates},
        "accuracies": {str(seed): _finite(accuracy) for seed, accuracy in group.accuracies.items()},
        "mean": _finite(group.summary.mean),
        "deviation": _finite(group.summary.deviation),
        "minus_none": _difference(comparison.difference(group)),
        "minus_best_other": _difference(group.minus(rival) if rival else None),
        "best_other": rival.method if rival else None,
        "interpolations": [
            {
                "alpha": point.alpha,
                "accuracy": _finite(point.accuracy.mean),
                "retention": _finite(point.retention.mean),
                "cross_entropy": _finite(point.cross_entropy.mean),
                "seeds": point.accuracy.count,
            }
            for point in (frontier.points(group, on) if on else ())
        ],
    }


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "mean": _finite(difference.mean),
        "interval": None if difference.interval is None else [*difference.interval],
        "beyond_noise": difference.beyond_noise,
    }


def _swept(run: Run) -> dict[str, Any]:
    about = part(run)
    config = run.info["config"]
    return {
        "key": about["key"],
        "method": config["method"],
        "value": about["value"],
        "seed": config["seed"],
        "accuracy": _finite(outcome(run, "test_accuracy")),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
