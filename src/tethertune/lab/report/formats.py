"""Numbers and configuration values as a reader wants to see them. Accuracies come as fractions and leave in percent."""

import math
from collections.abc import Mapping
from typing import Any

from tethertune.lab.report.statistics import Difference, Summary

__all__ = [
    "AS_PRINTED",
    "accuracy",
    "duration",
    "fields",
    "interval",
    "name",
    "number",
    "points",
    "share",
    "sizes",
    "spread",
    "value",
]

AS_PRINTED = "as printed, not a valid bound"
"""What is said of every bound that is computed as the paper prints it."""

_MINUS = "\N{MINUS SIGN}"
_WORDS = {"lr": "learning rate", "head_lr": "head learning rate", "head_radius": "head", "head_strength": "head"}
_SPLITS = {"train": "training"}


def number(value: float, form: str = ".1f") -> str:
    """A number with a true minus sign; ``NaN`` or ``∞`` when it is not finite."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else f"{_MINUS}∞"
    return format(value, form).replace("-", _MINUS)


def share(fraction: float) -> str:
    """A fraction in percent, without the sign: ``75.6``."""
    return number(100 * fraction)


def accuracy(fraction: float) -> str:
    """A fraction in percent: ``75.6 %``."""
    return f"{share(fraction)} %" if math.isfinite(fraction) else number(fraction)


def spread(summary: Summary) -> str:
    """Mean and deviation in percent: ``75.6 ± 3.9 %``; without the deviation where there is none."""
    if not math.isfinite(summary.deviation):
        return accuracy(summary.mean)
    return f"{share(summary.mean)} ± {share(summary.deviation)} %"


def points(fraction: float) -> str:
    """A difference of fractions in points, with its sign: ``+4.4``."""
    return number(100 * fraction, "+.1f")


def interval(difference: Difference) -> str:
    """The interval of a difference in points: ``+1.2 to +7.8``; ``-`` where there is none."""
    if difference.interval is None:
        return "-"
    low, high = difference.interval
    return f"{points(low)} to {points(high)}"


def sizes(images: Mapping[str, int]) -> str:
    """Images of each split: ``3,334 training, 3,333 validation, 3,333 test``."""
    return ", ".join(f"{count:,} {_SPLITS.get(split, split)}" for split, count in images.items())


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: ``48 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if not math.isfinite(seconds):
        return number(seconds)
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def value(setting: Any) -> str:
    """One configuration value: ``yes``, ``no``, ``-`` for none, numbers without trailing zeros, lists with commas."""
    if setting is None:
        return "-"
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    if isinstance(setting, float):
        return number(setting, "g")
    if isinstance(setting, list | tuple):
        return ", ".join(map(value, setting)) or "-"
    if isinstance(setting, Mapping):
        return fields(setting) or "-"
    return str(setting)


def name(setting: str) -> str:
    """A configuration name in words: ``head radius``, ``learning rate``."""
    return _WORDS[setting] if setting in ("lr", "head_lr") else setting.replace("_", " ")


def fields(settings: Mapping[str, Any]) -> str:
    """Names and values in a row of words: ``head pool, learning rate 0.0003``."""
    return ", ".join(
        f"{_WORDS.get(name, name.replace('_', ' '))} {value(setting)}" for name, setting in settings.items()
    )
