r"""Leaving the reference unread while no row can have left its ball.

Each row's *reach* is an upper bound of its distance: the distance when it was last measured, plus what the optimiser
can have moved it since. While the reach is within the radius, the row is inside for certain and neither it nor its
reference is read. That pays where the reference is not in fast memory: mapped from a file, or on the host beside an
accelerator.

How far Adam can move a weight in a step is known without a look at it. With the averages :math:`m` of gradients and
:math:`v` of their squares, let :math:`m^2 \le R v` for all weights. Then, by the inequality of Cauchy and Schwarz,
:math:`m' = \beta_1 m + (1 - \beta_1) g` and :math:`v' = \beta_2 v + (1 - \beta_2) g^2` have

.. math:: m'^2 \le R' v', \qquad R' = \frac{\beta_1^2}{\beta_2} R + \frac{(1 - \beta_1)^2}{1 - \beta_2},

whatever the gradient, and the step is at most :math:`\eta \sqrt{R' (1 - \beta_2^t)} / (1 - \beta_1^t)`: one learning
rate at first, about 7 in the long run with the usual betas. AMSGrad only shortens it. R starts from the averages as
they are, so that loaded states, betas that change and any schedule are covered. AdamW's decay adds
:math:`\eta \lambda |w|`, and rounding its share; both are bounded through the norm of the reference row.

Those of :mod:`tethertune.optim` need no bound: they measure what they move while they move it, and leave the reference
unread by themselves. All other optimisers have no bound without reading gradients, and are refused.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, dropwhile, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from tethertune import norms
from tethertune.balls import Ball, Block
from tethertune.errors import AttachError
from tethertune.kernels.chunked import Chunked
from tethertune.optim import OnePass
from tethertune.reference import stretches
from tethertune.sharding import is_sharded, local

__all__ = ["Lazy", "require_bounded"]

_ROUNDINGS = 16  # more than there are in a step, each of half an epsilon
_GATHERED = 1 << 20  # weights of rows that are looked at together


def require_bounded(optimizer: Optimizer) -> None:
    """Check that a step of the optimiser measures what it moves, or has a bound that the host knows.

    Raises:
        AttachError: It is neither of :mod:`tethertune.optim` nor Adam or AdamW, or keeps its learning rate or its count
            of steps on an accelerator.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, OnePass) and not isinstance(optimizer, Adam):
        return
    if not (isinstance(optimizer, Adam) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(Adam.step)):
        raise AttachError(
            f"lazy=True needs a bound of how far a step can move a weight, and for {name} there is none without its"
            " gradients: use Adam or AdamW, or an optimizer of tethertune.optim, or lazy=False."
        )
    for group in optimizer.param_groups:
        away = any(local(p).device.type != "cpu" for p in group["params"])
        if away and (group["fused"] or group["capturable"] or isinstance(group["lr"], Tensor)):
            raise AttachError(
                f"lazy=True would have to wait for the accelerator, where {name} keeps its learning rate or its count"
                " of steps: use fused=False, capturable=False and a plain number for lr, or lazy=False."
            )


@dataclass(eq=False)
class _Followed:
    """What is known of one ball.

    Attributes:
        sizes: The l1 norms of the rows of the centre, float64, (rows,); or its Frobenius norm, (1,).
        reach: The upper bounds of the distances, float64, of the same shape; infinite: not known.
        ratio: R, the bound of ``m ** 2 / v``; NaN: not known. (With what v can lack by underflow added to v.)
        seen: Where and in which version the weight and the averages were after the last step.
        steps: How many steps the optimiser had counted then.
    """

    sizes: Tensor
    reach: Tensor
    ratio: float = math.nan
    seen: object = None
    steps: float = 0.0
    radius: tuple[object, Tensor] = field(default=(None, torch.empty(0)))


class Lazy:
    """Projects balls of a constraint after a step of Adam, reading only rows that may have left.

    Args:
        balls: Of the constraint. Those it can follow are the body's: not sharded or on an accelerator in the Frobenius
            norm, and not of batch-norm scales, whose balls move with the running variance.
        kernel: What measures and projects.
        device: Where the reference is kept; ``None``: beside the weights.
        every: Every so many steps all rows are read, which finds rows that have become NaN.

    Attributes:
        read: How many rows have been read in steps.
        rows: How many rows would have been read by a constraint that is not lazy.
    """

    def __init__(self, balls: Sequence[object], kernel: Chunked, device: torch.device | None, every: int) -> None:
        own = [ball for ball in balls if isinstance(ball, Ball)]
        self._balls = [ball for ball in own if ball.reference is not None and ball.centre_variance is None]
        self._kernel, self._device, self._every = kernel, device, every
        self._followed: dict[int, _Followed] = {}  # by the id of the ball
        self._steps = 0
        self.read = self.rows = 0

    def forget(self) -> None:
        """Take nothing for known any more, so that the next step reads every row."""
        self._followed.clear()

    def _held(self, optimizer: Optimizer) -> list[tuple[Ball, dict[str, Any]]]:
        """The balls that can be followed through this optimiser's steps, with their parameter groups."""
        if not isinstance(optimizer, Adam):
            return []
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        weights = [(ball, ball.layer.weight) for ball in self._balls]
        return [
            (ball, groups[id(w)])
            for ball, w in weights
            if id(w) in groups and local(w).numel() and (ball.by_row or (not is_sharded(w) and w.device.type == "cpu"))
        ]

    def covered(self, optimizer: Optimizer) -> frozenset[int]:
        """The ``id`` of each parameter that :meth:`after_step` brings inside."""
        return frozenset(id(ball.layer.weight) for ball, _ in self._held(optimizer))

    def before_step(self, optimizer: Optimizer) -> None:
        """Forget what belongs to weights or averages that were written to since the last step."""
        for ball, _ in self._held(optimizer):
            known = self._followed.get(id(ball))
            if known is not None and known.seen != _stamp(ball, optimizer):
                del self._followed[id(ball)]

    @torch.no_grad()
    def after_step(
        self, optimizer: Optimizer, hooks: tuple[int, int], settled: frozenset[int]
    ) -> dict[torch.device, int | Tensor]:
        """Bring inside what the step may have taken outside.

        Args:
            optimizer: That has just stepped; it passes :func:`require_bounded`.
            hooks: The ``id`` of the handles of its hooks that call :meth:`before_step` and this.
            settled: The ``id`` of parameters that are inside already, of which nothing is known then.

        Returns:
            How many rows are not finite and were left as they are, by device.
        """
        self._steps += 1
        if _others_between(optimizer, *hooks):
            self.forget()
        if self._steps % self._every == 0:
            for known in self._followed.values():
                known.reach.fill_(math.inf)
        broken: dict[torch.device, int | Tensor] = {}
        for ball, group in self._held(optimizer):
            weight = ball.layer.weight
            if id(weight) in settled:
                self._followed.pop(id(ball), None)
                continue
            blocks = ball.blocks(device=self._device)
            if id(ball) not in self._followed:
                sizes = _sizes(ball, blocks)
                self._followed[id(ball)] = _Followed(sizes, torch.full_like(sizes, math.inf))
            known = self._followed[id(ball)]
            _let_go(ball, known, group, optimizer.state.get(weight, {}))
            device = local(weight).device
            broken[device] = broken.get(device, 0) + self._settle(ball, blocks, known)
            known.seen = _stamp(ball, optimizer)
        return broken

    def _settle(self, ball: Ball, blocks: Sequence[Block], known: _Followed) -> int | Tensor:
        """Read, project and measure the rows whose reach is over their radius."""
        self.rows += len(known.reach)
        if not ball.by_row:
            if known.reach[0] <= ball.room:
                return 0
            parts = [(block.weight, block.centre) for block in blocks]
            count = self._kernel.frobenius(parts, ball.room, size=ball.size)
            known.reach[0] = self._kernel.squares(parts, exactly=True).sum().sqrt() * (1 + 1e-12)
            self.read += 1
            return count
        broken: int | Tensor = 0
        start = 0
        for block, radius in zip(blocks, _radii(blocks, known), strict=True):
            reach = known.reach[start : start + len(radius)]
            start += len(radius)
            due = (~(reach <= radius)).nonzero().squeeze(1)  # NaN is due
            self.read += len(due)
            for rows in stretches(due, max(1, _GATHERED * len(radius) // block.weight.numel())):
                there = rows.to(block.weight.device)
                W, centre = block.weight[there], block.centre[rows.to(block.centre.device)]
                before = W.clone()
                broken = broken + self._kernel.rows(W, centre, block.radius[there], size=ball.size)
                if W.device.type != "cpu" or not torch.equal(W, before):
                    block.weight.index_copy_(0, there, W)
                reach[rows] = self._kernel.distances(W, centre).cpu() * (1 + 1e-12)
        return broken


def _let_go(ball: Ball, known: _Followed, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Add to the reach what the step of one parameter can have moved."""
    steps = float(state["step"]) if "step" in state else 0.0
    if steps == known.steps:
        return  # it was not stepped: no gradient, or a step that a scaler skipped
    lr, beta1, beta2 = float(group["lr"]), *map(float, group["betas"])
    underflow = torch.finfo(state["exp_avg_sq"].dtype).tiny / (1 - beta2)  # what v can lack of what it stands for
    if steps != known.steps + 1 or math.isnan(known.ratio):
        known.ratio = _measured_ratio(state, underflow)
        known.reach.fill_(math.inf)
    else:
        known.ratio = beta1**2 / beta2 * known.ratio + (1 - beta1) ** 2 / (1 - beta2)
        known.ratio *= 1 + _ROUNDINGS * torch.finfo(state["exp_avg"].dtype).eps
    known.steps = steps
    W = local(ball.layer.weight)
    columns = W.numel() // len(known.reach)
    steepest = math.sqrt(1 - beta2**steps) + (math.sqrt(underflow) / group["eps"] if group["eps"] else math.inf)
    element = lr * math.sqrt(known.ratio) * steepest / (1 - beta1**steps)
    moved = element * (columns if ball.norm == "mars" else math.sqrt(columns)) * (1 + 1e-6)
    share = (lr * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0) * (1 + 1e-6)
    share += _ROUNDINGS * torch.finfo(W.dtype).eps
    known.reach += moved + share * (known.sizes + known.reach + moved)


def _measured_ratio(state: dict[str, Any], underflow: float) -> float:
    """The largest ``m ** 2 / (v + underflow)`` of a parameter."""
    pairs = zip(stretches(local(state["exp_avg"])), stretches(local(state["exp_avg_sq"])), strict=True)
    return max(float((m.double().square() / (v.double() + underflow)).max()) for m, v in pairs) * (1 + 1e-6)


def _others_between(optimizer: Optimizer, before: int, after: int) -> bool:
    """Whether hooks of other code, which may write to the weights, run between ours before and after the step."""
    following = dropwhile(lambda known: known[0] != before, optimizer._optimizer_step_pre_hooks.items())
    preceding = takewhile(lambda known: known[0] != after, optimizer._optimizer_step_post_hooks.items())
    modules = [str(getattr(hook, "__module__", "")) for _, hook in (*following, *preceding)]
    return not all(module.startswith("tethertune.") for module in modules)


def _sizes(ball: Ball, blocks: Sequence[Block]) -> Tensor:
    if not ball.by_row:
        return torch.tensor([ball.size], dtype=torch.float64)
    parts = [part for block in blocks for part in stretches(block.centre)]
    return torch.cat([norms.row_sums(part.reshape(len(part), -1)).cpu() for part in parts])


def _radii(blocks: Sequence[Block], known: _Followed) -> Sequence[Tensor]:
    """The radii of each block's rows on the host, fetched again when they have changed."""
    key = [(block.radius.data_ptr(), block.radius._version) for block in blocks]
    if known.radius[0] != key:
        known.radius = (key, torch.cat([block.radius for block in blocks]).cpu())
    ends = list(accumulate(len(block.radius) for block in blocks))
    return [known.radius[1][start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _stamp(ball: Ball, optimizer: Optimizer) -> object:
    """Changes when somebody writes to a weight or to its averages, by anything but ``.data``."""
    weight = ball.layer.weight
    state = optimizer.state.get(weight, {})
    tensors = [weight, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]
    return [(id(t), local(t).data_ptr(), local(t)._version) for t in tensors]
