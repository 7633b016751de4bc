"""Callbacks for the Trainer of the package ``lightning`` (of ``pytorch_lightning``: the module of that name).

.. code-block:: python

    from tethertune.integrations.lightning import ConstraintCallback

    tether = ConstraintCallback(norm="mars", radius=tt.Relative(0.02), head="network.fc", head_radius=10.0)
    trainer = lightning.Trainer(max_epochs=3, callbacks=[tether])
    trainer.fit(module, ckpt_path="last")
    tether.constraint.distances()

The reference is the module as it is when ``fit`` begins, so give it the *pre-trained* weights, also to resume:
Lightning loads the checkpoint later, and that the reference is the same as at the beginning is checked then.
"""

from tethertune.errors import MissingExtraError
from tethertune.integrations.hooks import ConstraintHooks, PenaltyHooks

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingExtraError(
        "The callbacks need the package lightning: pip install 'tethertune[lightning]'. For pytorch_lightning, import"
        " tethertune.integrations.pytorch_lightning."
    ) from error

__all__ = ["ConstraintCallback", "PenaltyCallback"]


class ConstraintCallback(ConstraintHooks, Callback):  # type: ignore[misc]
    """Keeps the module inside the balls of a :class:`~tethertune.Constraint` after every step of its optimisers.

    Works with gradient accumulation, mixed precision, several optimisers, manual optimisation and DDP, as the
    constraint does. At the steps at which the trainer logs it logs ``tether/largest_share`` and
    ``tether/median_share`` (distances as shares of their radii) and ``tether/layers_at_radius``.

    Args:
        log: ``"summary"``, ``"layers"`` for the distance of every layer besides, or ``"off"``.
        options: The keyword arguments of :class:`~tethertune.Constraint`; names start at the module
            (``"network.fc"``).

    Raises:
        ConfigurationError: An option that is not allowed, or a checkpoint that was saved with other options.
        AttachError: An optimiser cannot carry the constraint.
        ReferenceMismatchError: A checkpoint of another reference, or saved without this callback.
    """


class PenaltyCallback(PenaltyHooks, Callback):  # type: ignore[misc]
    """Adds the gradient of a :class:`~tethertune.Penalty` before every step of the module's optimisers.

    The penalty counts once a step, whatever the accumulation, and after the clipping of gradients. Its value is logged
    as ``tether/penalty`` (not where the weights are sharded).

    Args:
        log: ``"summary"``, ``"layers"`` for the distance of every layer besides, or ``"off"``.
        options: The keyword arguments of :class:`~tethertune.Penalty`.

    Raises:
        ConfigurationError: As of :class:`ConstraintCallback`.
        AttachError: An optimiser cannot carry the penalty.
        ReferenceMismatchError: A checkpoint of another reference, or saved without this callback.
    """
