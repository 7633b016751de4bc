"""What an optimiser steps, with the balls of the weights: a table for ``c/optimiser.c``, and one call a step."""

import ctypes
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from tethertune.kernels import library
from tethertune.kernels.chunked import gapless_rows
from tethertune.kernels.native import Block, supports
from tethertune.kernels.stretches import Stretches

__all__ = ["Held", "Rule", "StepTable", "state_suits", "suits"]

_ZERO = 3  # the type of a centre that is 0
_PIECE = 1 << 15  # as in c/ball.h
State: TypeAlias = Mapping[str, Any]


class Held(NamedTuple):
    """A parameter in a ball.

    Attributes:
        parameter: Whose weights they are.
        rows: The weights as rows, with their centre and radius; ``None`` for what the C kernels cannot do.
        by_row: Whether each row has a ball; otherwise all of them have one together (Frobenius).
    """

    parameter: Tensor
    rows: Stretches | None
    by_row: bool


class Rule(ctypes.Structure):
    """``struct rule`` of ``c/optimiser.c``: the options of a parameter group."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "decay", "momentum", "dampening")),
        *((name, ctypes.c_int32) for name in ("kind", "nesterov", "maximize")),
    )


class _State(ctypes.Structure):
    """``struct state`` of ``c/optimiser.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("guards", "first", "second", "largest", "steps")),
        ("fresh", ctypes.c_int64),
    )


_PLACES = {
    "step": "steps",
    "exp_avg": "first",
    "exp_avg_sq": "second",
    "max_exp_avg_sq": "largest",
    "momentum_buffer": "first",
}


def suits(parameter: Tensor) -> bool:
    """Whether C can step a parameter: it and its gradient are float32, on the CPU, without gaps, in one order."""
    gradient = parameter.grad
    return (
        type(parameter) in (Tensor, nn.Parameter)
        and not parameter.is_inference()
        and _is_like(parameter, parameter)
        and _is_dense(parameter)
        and gradient is not None
        and _is_like(gradient, parameter)
    )


def state_suits(parameter: Tensor, state: State, names: Sequence[str]) -> bool:
    """Whether C can step with the state of a parameter: tensors like it, and a count of steps in float32."""
    for name in names:
        tensor = state.get(name)
        if tensor is None or not _is_like(tensor, tensor if name == "step" else parameter):
            return False
    return "step" not in names or state["step"].numel() == 1


def _is_like(tensor: Tensor, parameter: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.shape == parameter.shape
        and tensor.stride() == parameter.stride()
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements, of which there are some, fill a stretch of memory in any order of the axes."""
    return tensor.numel() > 0 and gapless_rows(tensor.unsqueeze(0), tensor.numel())


class StepTable:
    """What C needs to know of parameters, as long as they, their state and their balls stay where they are.

    Args:
        parameters: Those that it can step.
        states: The optimiser's state, by parameter.
        names: The keys of the state that the rule uses.
        held: Balls by the ``id`` of the parameter; those that do not lie where the parameter lies are left out.
        fresh: The ``id`` of parameters whose momentum holds nothing yet.

    Attributes:
        parameters: As given, in another order.
        settled: The ``id`` of each parameter that is brought into its ball.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        states: Mapping[Tensor, State],
        names: Sequence[str],
        held: Mapping[int, Held],
        fresh: Collection[int] = (),
    ) -> None:
        rows = {id(p): held[id(p)].rows for p in parameters if id(p) in held}
        balls = {id(p): ball for p in parameters if (ball := rows.get(id(p))) is not None and _lies_in(p, ball)}
        layers = [p for p in parameters if id(p) in balls and not held[id(p)].by_row]
        self.parameters = layers + [p for p in parameters if id(p) not in balls or held[id(p)].by_row]
        self.settled = frozenset(balls)
        self._balls = balls  # the memory of centres and radii
        self._states, self._names, self._layers, self._fresh = states, names, len(layers), bool(fresh)
        self._state_of = [states.get(p, {}) for p in self.parameters]
        self._tensors = [*self.parameters, *(state[name] for state in self._state_of for name in names)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._strides = [p.stride() for p in self.parameters]
        count = len(self.parameters)
        self._blocks = (Block * count)(*(_block(p, balls.get(id(p))) for p in self.parameters))
        self._fields = (_State * count)()
        self._guards = [_guards(balls.get(id(p))) for p in self.parameters]
        for p, state, guards, fields in zip(self.parameters, self._state_of, self._guards, self._fields, strict=True):
            fields.fresh = id(p) in fresh
            fields.guards = guards.data_ptr()
            for name in names:
                setattr(fields, _PLACES[name], state[name].data_ptr())
        self._gradients = (ctypes.c_uint64 * count)()

    def ready(self) -> bool:
        """Whether everything is where it was; notes where the gradients are now."""
        addresses: list[ctypes.c_uint64 | int] = []
        dtype, layout = torch.float32, torch.strided
        for p, stride in zip(self.parameters, self._strides, strict=True):
            gradient = p.grad
            if gradient is None or gradient.dtype is not dtype or gradient.layout is not layout:
                return False
            if gradient.stride() != stride or p.stride() != stride:
                return False
            addresses.append(gradient.data_ptr())
        self._gradients[:] = addresses
        names, count = self._names, len(addresses)
        now = [state.get(name) for state in self._state_of for name in names]
        return (
            all(map(is_, now, self._tensors[count:]))
            and (not names or all(map(is_, map(self._states.get, self.parameters), self._state_of)))
            and [tensor.data_ptr() for tensor in self._tensors] == self._addresses
        )

    def step(self, rule: Rule) -> int:
        """Step, once it is :meth:`ready`; returns how many rows or layers with a ball are not finite and were left."""
        broken: int = _function()(
            ctypes.byref(rule),
            self._blocks,
            self._fields,
            self._gradients,
            self._layers,
            len(self._blocks),
            torch.get_num_threads(),
        )
        if broken < 0:
            raise MemoryError("no memory for the step of the optimiser")
        if self._fresh:
            self._fresh = False
            for fields in self._fields:
                fields.fresh = False
        increment_version(self.parameters)
        return broken

    def broken(self) -> dict[int, int]:
        """By the ``id`` of each parameter, how many rows the last step found not to be finite, if any."""
        return {id(p): b.broken for p, b in zip(self.parameters, self._blocks, strict=True) if b.broken}


def _lies_in(parameter: Tensor, ball: Stretches) -> bool:
    """Whether the rows are the memory of the parameter, one after the other."""
    W = ball.weight
    same = W.data_ptr() == parameter.data_ptr() and W.numel() == parameter.numel()
    return same and W.dtype == torch.float32 and supports(ball) and (len(W) == 1 or W.stride(0) == W.shape[1])


def _guards(ball: Stretches | None) -> Tensor:
    """Room for ``struct guard`` of each row or piece, nothing known yet: a Frobenius ball may have fewer of these."""
    count = 0 if ball is None else len(ball.weight) * math.ceil(ball.weight.shape[1] / _PIECE)
    return torch.full((count, 2), math.inf, dtype=torch.float64)


def _block(parameter: Tensor, ball: Stretches | None) -> Block:
    if ball is not None:
        return Block.of(ball)
    size = parameter.numel()
    return Block(w=parameter.data_ptr(), rows=1, columns=size, w_step=size, c_type=_ZERO)


@functools.cache
def _function() -> Any:
    function = library.load().tethertune_step
    function.restype = ctypes.c_int64
    tables: list[Any] = [
        ctypes.POINTER(Rule),
        ctypes.POINTER(Block),
        ctypes.POINTER(_State),
        ctypes.POINTER(ctypes.c_uint64),
    ]
    function.argtypes = [*tables, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    return function
