"""Activations by the name of their operator: Lipschitz constant, value at 0, largest absolute value.

Constants that are not round are rounded up in the last digit. An argument that makes a function that is not covered
raises ValueError with the reason.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["ACTIVATIONS"]

Shape = tuple[float, float, float]
Values = Mapping[str, Any]


def _fixed(lipschitz: float, at_zero: float = 0.0, ceiling: float = math.inf) -> Callable[[Values], Shape]:
    return lambda _: (lipschitz, at_zero, ceiling)


def _number(values: Values, key: str) -> float:
    value = values[key]
    if not isinstance(value, (int, float)):
        raise ValueError(f"its {key} is computed, not a number")  # noqa: TRY004 (one kind of refusal)
    return float(value)


def _positive(values: Values, key: str) -> float:
    value = _number(values, key)
    if not value > 0:
        raise ValueError(f"its {key} is {value:g}, not above 0")
    return value


def _clipped(low: str, high: str) -> Callable[[Values], Shape]:
    def shape(values: Values) -> Shape:
        a = -math.inf if values.get(low) is None else _number(values, low)
        b = math.inf if values.get(high) is None else _number(values, high)
        return 1.0, min(max(0.0, a), b), max(abs(a), abs(b))

    return shape


def _leaky(values: Values) -> Shape:
    return max(1.0, abs(_number(values, "negative_slope"))), 0.0, math.inf


def _elu(values: Values) -> Shape:
    alpha, scale, inner = (_positive(values, key) for key in ("alpha", "scale", "input_scale"))
    return scale * max(1.0, alpha * inner), 0.0, math.inf


def _celu(values: Values) -> Shape:
    _positive(values, "alpha")
    return 1.0, 0.0, math.inf


def _softplus(values: Values) -> Shape:
    if _number(values, "threshold") < 20:  # PyTorch's own: it jumps by log(1 + exp(-threshold)) / beta there
        raise ValueError(f"its threshold is {values['threshold']:g}, where it jumps: 20 or more is covered")
    return 1.0, math.log(2) / _positive(values, "beta"), math.inf


ACTIVATIONS: dict[str, Callable[[Values], Shape]] = {
    "relu": _fixed(1.0),
    "relu6": _fixed(1.0, 0.0, 6.0),
    "leaky_relu": _leaky,
    "elu": _elu,
    "celu": _celu,
    "selu": _fixed(1.75810),
    "silu": _fixed(1.09984),
    "gelu": _fixed(1.12905),
    "mish": _fixed(1.08850),
    "hardswish": _fixed(1.5),
    "hardtanh": _clipped("min_val", "max_val"),
    "clamp": _clipped("min", "max"),
    "clamp_min": _clipped("min", ""),
    "clamp_max": _clipped("", "max"),
    "tanh": _fixed(1.0, 0.0, 1.0),
    "sigmoid": _fixed(0.25, 0.5, 1.0),
    "hardsigmoid": _fixed(1 / 6, 0.5, 1.0),
    "softplus": _softplus,
    "abs": _fixed(1.0),
}
