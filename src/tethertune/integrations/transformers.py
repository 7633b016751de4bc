"""Callbacks for the Trainer of Hugging Face transformers, and for those built on it, such as TRL's ``SFTTrainer``.

.. code-block:: python

    from tethertune.integrations.transformers import ConstraintCallback

    tether = ConstraintCallback(norm="mars", radius=tt.Relative(0.02), head="classifier", head_radius=10.0)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[tether])
    trainer.train(resume_from_checkpoint=True)
    tether.constraint.distances()

The reference is the model as it is when the Trainer is made, so make it with the *pre-trained* weights, also to
resume: the Trainer loads the checkpoint later, and that the reference is the same as at the beginning is checked then.
Only with FSDP's ``cpu_ram_efficient_loading`` no rank but the first has weights at that time: the reference is taken
when they have been sharded, and to resume, ``reference=`` has to name the file of the pre-trained weights.
"""

import os
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tethertune.constraint import Constraint
from tethertune.errors import ConfigurationError, MissingExtraError
from tethertune.integrations.tether import Log, Tether, measure_constraint, measure_penalty
from tethertune.penalty import Penalty

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError("The callbacks need the package transformers: pip install 'tethertune[hf]'.") from error

__all__ = ["ConstraintCallback", "PenaltyCallback"]


class _Callback(TrainerCallback):  # type: ignore[misc]
    """Takes the reference when the Trainer is made, attaches when it begins to train, and adds to what it logs.

    What a checkpoint is to say of the constraint stands in its ``trainer_state.json``, beside the states of the
    Trainer's own callbacks; the Trainer would make a new callback from one of *theirs*, without the reference.
    """

    _tether: Tether[Any]
    _key: str

    def on_init_end(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Take the reference, where every rank has the weights."""
        if not _only_rank_0_has_the_weights():
            self._tether.take_reference(model)

    def on_train_begin(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Compare with the checkpoint, if one was loaded, and attach."""
        resumed = state.global_step > 0
        built = self._tether.begin(model, resumed=resumed)
        saved = state.stateful_callbacks
        if resumed:
            self._tether.check(saved.get(self._key))
        elif self._key in saved:
            raise ConfigurationError(
                f"This Trainer has two callbacks of the type {type(self).__name__}: give one, with include=, exclude="
                " or a mapping for different layers."
            )
        self._tether.attach(optimizer)
        saved[self._key] = built.state_dict()

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        *,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Add to the logs of the training, in the history and for the callbacks that come after this one."""
        if self._tether.built is not None and ("loss" in logs or "train_loss" in logs):
            values = self._measure()
            logs.update(values)
            state.log_history[-1].update(values)

    def _measure(self) -> dict[str, float]:
        raise NotImplementedError


def _only_rank_0_has_the_weights() -> bool:
    """Whether FSDP's ``cpu_ram_efficient_loading`` leaves those of the other ranks empty until they are sharded."""
    asked = (os.environ.get(name, "false") for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"))
    return all(value.lower() in ("1", "true", "yes") for value in asked)


class ConstraintCallback(_Callback):
    """Keeps the model inside the balls of a :class:`~tethertune.Constraint` after every step of the Trainer.

    Works with gradient accumulation, mixed precision, ``torch_compile``, DDP and FSDP2, as the constraint does. With
    each log of the training loss it reports ``tether/largest_share`` and ``tether/median_share`` (distances as shares
    of their radii) and ``tether/layers_at_radius``. They are in ``trainer.state.log_history`` and in what callbacks
    after this one are given. The reporters that the Trainer makes of ``report_to`` come before it: move it
    to the front, ``trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(tether))``.

    Args:
        log: ``"summary"``, ``"layers"`` for the distance of every layer besides, or ``"off"``.
        options: The keyword arguments of :class:`~tethertune.Constraint`.

    Raises:
        ConfigurationError: An option that is not allowed (when the Trainer is made), two such callbacks in a Trainer,
            or a checkpoint that was saved with other options.
        AttachError: The optimiser cannot carry the constraint.
        ReferenceMismatchError: A checkpoint of another reference, or saved without this callback.
    """

    _key = "tethertune.Constraint"

    def __init__(self, *, log: Log = "summary", **options: Any) -> None:
        self._tether: Tether[Constraint] = Tether(Constraint, options, log)

    @property
    def constraint(self) -> Constraint | None:
        """The constraint; ``None`` before the Trainer is made."""
        return self._tether.built

    def _measure(self) -> dict[str, float]:
        assert self._tether.built is not None
        return measure_constraint(self._tether.built, self._tether.log)


class PenaltyCallback(_Callback):
    """Adds the gradient of a :class:`~tethertune.Penalty` before every step of the Trainer.

    The penalty counts once a step, whatever the accumulation, and after the clipping of gradients. The Trainer's
    ``loss`` stays the data's; the penalty's value is logged beside it as ``tether/penalty`` (not where the weights are
    sharded).

    Args:
        log: ``"summary"``, ``"layers"`` for the distance of every layer besides, or ``"off"``.
        options: The keyword arguments of :class:`~tethertune.Penalty`.

    Raises:
        ConfigurationError: As of :class:`ConstraintCallback`.
        AttachError: The optimiser cannot carry the penalty.
        ReferenceMismatchError: A checkpoint of another reference, or saved without this callback.
    """

    _key = "tethertune.Penalty"

    def __init__(self, *, log: Log = "summary", **options: Any) -> None:
        self._tether: Tether[Penalty] = Tether(Penalty, options, log)

    @property
    def penalty(self) -> Penalty | None:
        """The penalty; ``None`` before the Trainer is made."""
        return self._tether.built

    def _measure(self) -> dict[str, float]:
        assert self._tether.built is not None
        return measure_penalty(self._tether.built, self._tether.log)
