"""The hooks of Lightning, for the ``Callback`` of either of its packages, ``lightning`` and ``pytorch_lightning``."""

from typing import Any

from tethertune.constraint import Constraint
from tethertune.integrations.tether import Log, Tether, measure_constraint, measure_penalty
from tethertune.penalty import Penalty

__all__ = ["ConstraintHooks", "PenaltyHooks"]


class _Hooks:
    """Takes the reference in ``setup``, before a checkpoint is loaded; attaches in ``on_fit_start``; logs."""

    _tether: Tether[Any]

    def __init__(self, tether: Tether[Any]) -> None:
        super().__init__()
        self._tether = tether
        self._saved: dict[str, Any] | None = None

    def setup(self, _trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the reference."""
        if stage == "fit":
            self._saved = None
            self._tether.take_reference(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimisers."""
        # Sharding strategies load the checkpoint's weights only after this hook.
        resumed = trainer.ckpt_path is not None and not trainer.strategy.restore_checkpoint_after_setup
        self._tether.begin(pl_module, resumed=resumed)
        self._tether.attach(*trainer.optimizers)

    def on_train_start(self, trainer: Any, _pl_module: Any) -> None:
        """Compare with the checkpoint, if one was loaded."""
        if trainer.ckpt_path is not None:
            self._tether.check(self._saved)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint is to say of the reference and the options."""
        return {} if self._tether.built is None else self._tether.built.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the checkpoint says, for the time when all of it is loaded."""
        self._saved = state_dict

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log, at the steps at which the trainer logs."""
        if trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._measure())

    def _measure(self) -> dict[str, float]:
        raise NotImplementedError


class ConstraintHooks(_Hooks):
    """The hooks of a ``ConstraintCallback``."""

    def __init__(self, *, log: Log = "summary", **options: Any) -> None:
        super().__init__(Tether(Constraint, options, log))

    @property
    def constraint(self) -> Constraint | None:
        """The constraint; ``None`` before ``fit``."""
        built: Constraint | None = self._tether.built
        return built

    def _measure(self) -> dict[str, float]:
        assert self.constraint is not None
        return measure_constraint(self.constraint, self._tether.log)


class PenaltyHooks(_Hooks):
    """The hooks of a ``PenaltyCallback``."""

    def __init__(self, *, log: Log = "summary", **options: Any) -> None:
        super().__init__(Tether(Penalty, options, log))

    @property
    def penalty(self) -> Penalty | None:
        """The penalty; ``None`` before ``fit``."""
        built: Penalty | None = self._tether.built
        return built

    def _measure(self) -> dict[str, float]:
        assert self.penalty is not None
        return measure_penalty(self.penalty, self._tether.log)
