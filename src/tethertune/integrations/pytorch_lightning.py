"""The callbacks of :mod:`tethertune.integrations.lightning` for the package under its other name."""

from tethertune.errors import MissingExtraError
from tethertune.integrations.hooks import ConstraintHooks, PenaltyHooks

try:
    from pytorch_lightning import Callback
except ImportError as error:
    raise MissingExtraError(
        "The callbacks need the package pytorch_lightning: pip install pytorch_lightning. For lightning, import"
        " tethertune.integrations.lightning."
    ) from error

__all__ = ["ConstraintCallback", "PenaltyCallback"]


class ConstraintCallback(ConstraintHooks, Callback):  # type: ignore[misc]
    """As :class:`tethertune.integrations.lightning.ConstraintCallback`, for ``pytorch_lightning.Trainer``."""


class PenaltyCallback(PenaltyHooks, Callback):  # type: ignore[misc]
    """As :class:`tethertune.integrations.lightning.PenaltyCallback`, for ``pytorch_lightning.Trainer``."""
