"""Adam, AdamW and SGD that bring the weights back into their balls while they move them.

They are PyTorch's own classes, with PyTorch's arguments, state and results. A projection after the optimiser's step has
to read all weights once more; here a row is moved, measured and, where it is outside, scaled while it is in the cache.
They are used like PyTorch's, and :meth:`tethertune.Constraint.attach` sees what it has been given:

.. code-block:: python

    optimizer = tethertune.optim.AdamW(model.parameters(), lr=1e-3)
    constraint.attach(optimizer)

It is one pass for float32 parameters on a CPU where there are C kernels (``constraint.backend``). For everything else
PyTorch's own step runs and the constraint projects after it, with the same result: other dtypes and devices, sparse
gradients, ``differentiable``, a ``GradScaler`` that leaves the scale to the optimiser, ``torch.compile`` of the step,
Euclidean projections, layers with gaps in memory or a ball in two constraints; and all layers where a step hook of
other code comes before the constraint's, because it may write to the weights. ``fused=False`` or ``foreach=True`` ask
for it.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from operator import is_
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from tethertune.kernels import backend
from tethertune.kernels.one_pass import Held, Rule, StepTable, state_suits, suits

__all__ = ["SGD", "Adam", "AdamW"]

_CPU = torch.device("cpu")
_ADAM, _ADAMW, _SGD = range(3)  # as c/optimiser.c numbers them


class Tethered(Protocol):
    """Who holds parameters in balls: a constraint."""

    @property
    def form(self) -> object:
        """Another object whenever a ball has become another one."""

    def held(self) -> Sequence[Held]:
        """All balls, of the weights where they are now."""


class Done(NamedTuple):
    """What a step has done of somebody's balls.

    Attributes:
        settled: The ``id`` of each parameter that has been brought inside.
        broken: How many rows, or layers with a Frobenius ball, are not finite and were left as they are.
    """

    settled: frozenset[int] = frozenset()
    broken: int = 0


class _Group:
    """A parameter group, divided into what is stepped in C and what is not, until something about it changes."""

    def __init__(self, group: dict[str, Any], names: Sequence[str], holders: Sequence[Tethered]) -> None:
        self.group, self.names, self.holders = group, names, holders
        self.forms = [holder.form for holder in holders]
        self.parameters = list(group["params"])
        self.idle = [p for p in self.parameters if p.grad is None]
        self.others = [p for p in self.parameters if p.grad is not None]
        self.table: StepTable | None = None
        self.settled: dict[int, frozenset[int]] = {}  # by the id of the holder

    def fill(self, states: Mapping[Tensor, Any], fresh: Collection[int]) -> None:
        """Take over what C can step, with its balls."""
        mine = [p for p in self.others if suits(p) and state_suits(p, states.get(p, {}), self.names)]
        owners, held = _sole_owners(self.holders)
        if mine:
            self.table = StepTable(mine, states, self.names, held, fresh)
            for key in self.table.settled:
                self.settled[id(owners[key])] = self.settled.get(id(owners[key]), frozenset()) | {key}
        taken = set(map(id, mine))
        self.others = [p for p in self.others if id(p) not in taken]

    def ready(self, group: dict[str, Any], names: Sequence[str], holders: Sequence[Tethered]) -> bool:
        """Whether nothing has changed."""
        forms = [holder.form for holder in holders]
        parameters = group["params"]
        return (
            group is self.group
            and names == self.names
            and len(forms) == len(self.forms)
            and all(map(is_, forms, self.forms))
            and len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and all(p.grad is None for p in self.idle)
            and (self.table is None or self.table.ready())
        )


def _sole_owners(holders: Sequence[Tethered]) -> tuple[dict[int, Tethered], dict[int, Held]]:
    """Who holds a parameter and in which ball, by its ``id``, if it is held once and C can do it."""
    found = [(id(ball.parameter), holder, ball) for holder in holders for ball in holder.held()]
    times = Counter(key for key, _, _ in found)
    sole = [(key, holder, ball) for key, holder, ball in found if times[key] == 1 and ball.rows is not None]
    return {key: holder for key, holder, _ in sole}, {key: ball for key, _, ball in sole}


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("tethertune.")


class OnePass(Optimizer):
    """What the optimisers of this module share; a constraint looks for it when it is attached."""

    _tethers: Mapping[int, Tethered] = MappingProxyType({})  # by the id of the hook that does the rest
    _groups: Mapping[int, _Group] = MappingProxyType({})  # by the id of the parameter group
    _done: Mapping[int, Done] = MappingProxyType({})  # by the id of the holder

    def tether(self, holder: Tethered, hook: int) -> None:
        """Do balls in the step from now on.

        Args:
            holder: Who holds them.
            hook: The ``id`` of the handle of the step hook that does what the step has not done.
        """
        self._tethers = {**self._tethers, hook: holder}

    def done(self, holder: Tethered) -> Done:
        """What the step that has just ended has done for a holder; told once, so that nothing stale is believed."""
        found = self._done.get(id(holder), Done())
        self._done = {key: done for key, done in self._done.items() if key != id(holder)}
        return found

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        """PyTorch's ``step`` gathers a group's tensors here; what has been stepped in C is not among them."""
        if group is self.param_groups[0]:
            self._done = {}
        if not self._is_for_c(group):
            return super()._init_group(group, *lists)  # type: ignore[misc]
        names, holders = self._state_names(group), self._holders()
        known = self._groups.get(id(group))
        if known is None or not known.ready(group, names, holders):
            known = _Group(group, names, holders)
            plain = {**group, "params": [p for p in group["params"] if suits(p)]}
            known.fill(self.state, self._start(plain, *([] for _ in lists)))
            present = {id(g) for g in self.param_groups}
            self._groups = {key: old for key, old in self._groups.items() if key in present} | {id(group): known}
            if known.table is not None and not known.table.ready():
                raise AssertionError("a gradient or state changed while it was looked at")
        if known.table is not None:
            broken = known.table.step(self._rule(group))
            self._note(known.settled, known.table.broken() if broken else {})
        if not known.others:
            return False
        return super()._init_group({**group, "params": known.others}, *lists)  # type: ignore[misc]

    def _is_for_c(self, group: dict[str, Any]) -> bool:
        asked = group["fused"] is not False and not group["foreach"]
        plain = not (group["differentiable"] or group.get("capturable") or torch.compiler.is_compiling())
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        learnt = any(isinstance(value, Tensor) and value.requires_grad for value in group.values())
        if not asked or not plain or scaled or learnt or backend.forced() == "triton":
            return False
        return backend.choose(_CPU) == "native"

    def _holders(self) -> list[Tethered]:
        """Who holds balls; nobody if a hook of other code, which may write to the weights, comes before theirs."""
        hooks = self._optimizer_step_post_hooks
        holding = [key for key in self._tethers if key in hooks]
        first = dict(takewhile(lambda known: _is_ours(known[1]), hooks.items()))
        return [self._tethers[key] for key in holding] if all(key in first for key in holding) else []

    def _note(self, settled: Mapping[int, frozenset[int]], broken: Mapping[int, int]) -> None:
        """Add to what has been done what a group has settled, by holder, and what was not finite, by parameter."""
        for holder, keys in settled.items():
            before = self._done.get(holder, Done())
            count = before.broken + sum(number for key, number in broken.items() if key in keys)
            self._done = {**self._done, holder: Done(before.settled | keys if before.settled else keys, count)}

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of a parameter's state that a step uses."""
        raise NotImplementedError

    def _start(self, group: dict[str, Any], *_lists: list[Any]) -> Collection[int]:
        """Make the state of parameters that have none; returns the ``id`` of those whose momentum holds nothing."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any]) -> Rule:
        """The options of a group."""
        raise NotImplementedError


class _OnePassAdam(OnePass):
    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("step", "exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def _start(self, group: dict[str, Any], *lists: list[Any]) -> Collection[int]:
        super(OnePass, self)._init_group(group, *lists)  # type: ignore[misc]
        return ()

    def _rule(self, group: dict[str, Any]) -> Rule:
        beta1, beta2 = group["betas"]
        return Rule(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            decay=float(group["weight_decay"]),
            kind=_ADAMW if group["decoupled_weight_decay"] else _ADAM,
            maximize=group["maximize"],
        )


class Adam(_OnePassAdam, torch.optim.Adam):
    """:class:`torch.optim.Adam`, with the balls of an attached constraint in the same pass over the weights.

    Arguments, state dict and results are those of PyTorch's class, AMSGrad included.

    Example:
        >>> import tethertune as tt
        >>> model = torch.nn.Linear(4, 3)
        >>> constraint = tt.Constraint(model, norm="mars", radius=0.5)
        >>> optimizer = tt.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)
        >>> constraint.attach(optimizer)
        >>> for _ in range(3):
        ...     model(torch.ones(2, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> constraint.distances()["weight"].value <= 0.5
        True
    """


class AdamW(_OnePassAdam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, with the balls of an attached constraint in the same pass over the weights.

    Arguments, state dict and results are those of PyTorch's class. Weight decay draws towards 0, the ball holds around
    the reference.
    """


class SGD(OnePass, torch.optim.SGD):
    """:class:`torch.optim.SGD`, with the balls of an attached constraint in the same pass over the weights.

    Arguments, state dict and results are those of PyTorch's class, with momentum, dampening and Nesterov's form.
    """

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _start(self, group: dict[str, Any], *_lists: list[Any]) -> Collection[int]:
        fresh = []
        for p in group["params"] if group["momentum"] != 0 else ():
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                fresh.append(id(p))
        return fresh

    def _rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            lr=float(group["lr"]),
            decay=float(group["weight_decay"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            kind=_SGD,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
