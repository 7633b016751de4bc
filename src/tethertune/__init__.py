"""Fine-tune on a tether: every layer's weights stay inside a ball around the pre-trained weights.

Public names are loaded when they are first used, so that ``import tethertune`` and ``tethertune --help`` do not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tethertune import norms as norms
    from tethertune import optim as optim
    from tethertune import projections as projections
    from tethertune import rows as rows
    from tethertune import theory as theory
    from tethertune.constraint import Constraint, Distance
    from tethertune.errors import TethertuneError
    from tethertune.features import FeaturePenalty
    from tethertune.measure import Displacement, distances
    from tethertune.penalty import Penalty
    from tethertune.radii import Relative
    from tethertune.reference import Reference

__all__ = [
    "Constraint",
    "Displacement",
    "Distance",
    "FeaturePenalty",
    "Penalty",
    "Reference",
    "Relative",
    "TethertuneError",
    "distances",
]
__version__ = "0.1.0"

_HOMES = {
    "Constraint": "constraint",
    "Displacement": "measure",
    "Distance": "constraint",
    "FeaturePenalty": "features",
    "Penalty": "penalty",
    "Reference": "reference",
    "Relative": "radii",
    "TethertuneError": "errors",
    "distances": "measure",
}
_MODULES = ("norms", "optim", "projections", "rows", "theory")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
