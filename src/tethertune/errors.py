"""Everything that tethertune raises on purpose.

::

    TethertuneError
    ├── ConfigurationError (ValueError)     an argument, a configuration key or a combination is not allowed
    │   ├── PatternError                    a name pattern matches no parameter
    │   └── theory.NotCoveredError          a network holds an operation that no certificate covers
    ├── AttachError                         this optimiser cannot carry the constraint
    ├── ReferenceMismatchError              a reference of another network, another shape, or another fingerprint
    ├── NonFiniteWeightError (ArithmeticError)  a row holds a NaN or an infinity
    ├── CheckpointError                     a file is not a readable checkpoint
    ├── DataError                           an image, a class folder or a split cannot be used
    ├── RunError                            a run folder is of another run, or cannot be read or written
    │   └── RunInUseError                   another process holds it
    └── MissingExtraError (ImportError)     an optional dependency is not installed

Each message says what was given, what is allowed and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AttachError",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "MissingExtraError",
    "NonFiniteWeightError",
    "PatternError",
    "ReferenceMismatchError",
    "RunError",
    "RunInUseError",
    "TethertuneError",
]


class TethertuneError(Exception):
    """Base class of all errors that tethertune raises on purpose."""


class ConfigurationError(TethertuneError, ValueError):
    """An argument, a configuration key or a combination of them is not allowed."""


class PatternError(ConfigurationError):
    """A name pattern matches no parameter of the model."""


class AttachError(TethertuneError):
    """The optimiser cannot carry the constraint or penalty."""


class ReferenceMismatchError(TethertuneError):
    """The reference belongs to another network, another shape or another fingerprint."""


class NonFiniteWeightError(TethertuneError, ArithmeticError):
    """A row of a constrained weight holds a NaN or an infinity."""


class CheckpointError(TethertuneError):
    """A file is not a readable checkpoint, or not of this network."""


class DataError(TethertuneError):
    """An image, a class folder or a split cannot be used."""


class RunError(TethertuneError):
    """A run folder is in use, belongs to another run, or cannot be written."""


class RunInUseError(RunError):
    """Another process holds the run folder; the system frees it when that process ends, however it ends."""


class MissingExtraError(TethertuneError, ImportError):
    """An optional dependency is not installed."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x' or 'y'?`` for the names closest to the given one; empty when none is close."""
    close = get_close_matches(given, dict.fromkeys(allowed), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
