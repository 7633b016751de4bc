"""The constraint: every layer's weights stay inside a ball around the reference, after every optimiser step."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tethertune import radii, rows
from tethertune.adapters import AdaptedLayer, UpdateBall, base_weights, fold
from tethertune.attachment import inner_optimizer, require_parameters
from tethertune.balls import Ball, distance_between, make_ball, reference_norm
from tethertune.errors import (
    ConfigurationError,
    NonFiniteWeightError,
    ReferenceMismatchError,
    TethertuneError,
    did_you_mean,
)
from tethertune.kernels.chunked import Chunked, Parts, working_set
from tethertune.kernels.one_pass import Held
from tethertune.kernels.plan import Plan
from tethertune.lazy import Lazy, require_bounded
from tethertune.memory import Memory
from tethertune.optim import Done, OnePass
from tethertune.radii import Radius, Relative
from tethertune.reference import Reference, Source
from tethertune.rows import Convention, Layer, Role
from tethertune.sharding import is_sharded, local, reduce_over_shards

__all__ = ["AT_RADIUS", "Constraint", "Distance"]

AT_RADIUS = 0.99
"""A row counts as being at its radius from this share of it on."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Distance:
    """How far one layer is from its reference.

    Attributes:
        value: The distance in float64, in the norm: the largest row for MARS.
        radius: The largest distance allowed.
        norm: ``"mars"`` or ``"frobenius"``.
        role: ``"body"``, or ``"head"`` for a layer whose ball is centred at 0.
        active_rows: How many rows are at their radius (within 1 %); all or none for Frobenius.
        rows: How many rows the layer has.
    """

    value: float
    radius: float
    norm: Literal["mars", "frobenius"]
    role: Role
    active_rows: int
    rows: int


class Constraint:
    r"""Keeps every layer inside a ball around its reference: MARS-PGM and l2-PGM (Gouk et al., Algorithm 1).

    After every step of the optimiser it is attached to, :math:`\|W_j - W^0_j\| \le \gamma_j` holds for every
    constrained layer in the dtype that the weights are stored in, with the distance computed in float64; rows (MARS)
    or layers (Frobenius) that are inside keep their bits.

    Args:
        model: The network, with the pre-trained weights loaded.
        norm: ``"mars"`` (largest row l1 norm) or ``"frobenius"``.
        radius: gamma for the body's layers: a number >= 0, a :class:`Relative`, or a mapping from name patterns to
            either, of which the first that matches counts; a layer that none matches is free. ``math.inf`` leaves a
            layer free, 0 freezes it exactly.
        head: The new classification layer's module name (``"fc"``) or pattern. Its ball is centred at 0.
        head_radius: Its radius; ``None`` leaves it free.
        include: Names or patterns of parameters to constrain although their kind is free by default: embeddings,
            normalisation scales, biases, parameters of unknown modules (a row is an entry of axis 0).
        exclude: Names or patterns of layers to leave free.
        affine: ``"free"``, or ``"frozen"`` to hold the body's biases and normalisation scales at the reference.
        head_bias: The head's bias: ``"free"``, or ``"frozen"`` at 0, so that ``head_radius`` bounds the whole head.
        convention: ``"operator"``, or ``"authors"`` for the rows of the published code; see :mod:`tethertune.rows`.
        projection: Onto the row l1 ball: ``"radial"`` as in the paper, or ``"euclidean"``. The Frobenius projection
            is both.
        reference: The pre-trained weights: ``None`` for a copy of the model as it is now, or a state dict, a module,
            or the path of a safetensors file.
        reference_dtype: Keep the reference in this dtype. Where that is not exact, each radius is reduced by what the
            rounding moves the centre, so that the guarantee stays.
        reference_device: Keep the reference there; ``None``: beside the weights.
        check_every: On an accelerator, or where ``lazy`` leaves them unread, look for weights that are not finite
            every so many steps.
        lazy: Read a row and its reference only where the row may have left its ball, as the bound of Adam's and AdamW's
            steps tells (:mod:`tethertune.lazy`). It pays for a reference that is mapped from a file or on the host, and
            for radii that are large beside a step. Weights must change in the optimiser's step alone, or by operations
            that PyTorch counts: not through ``.data``. Other optimisers are refused when attaching.

    Raises:
        ConfigurationError: An argument that is not allowed.
        PatternError: A pattern that matches no parameter.
        ReferenceMismatchError: A reference of another network.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> constraint = Constraint(model, norm="mars", radius=0.5, head="2", head_radius=2.0)
        >>> constraint.attach(optimizer)
        >>> for _ in range(3):
        ...     loss = model(torch.ones(2, 4)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> all(d.value <= d.radius for d in constraint.distances().values())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Literal["mars", "frobenius"] = "mars",
        radius: Radius,
        head: str | None = None,
        head_radius: float | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        affine: Literal["free", "frozen"] = "free",
        head_bias: Literal["free", "frozen"] = "free",
        convention: Convention = "operator",
        projection: Literal["radial", "euclidean"] = "radial",
        reference: Source | None = None,
        reference_dtype: torch.dtype | None = None,
        reference_device: torch.device | str | None = None,
        check_every: int = 100,
        lazy: bool = False,
    ) -> None:
        if head is None and head_radius is not None:
            raise ConfigurationError(f"head_radius={head_radius} needs head=, the name of the new head's module.")
        if head is None and head_bias == "frozen":
            raise ConfigurationError("head_bias='frozen' needs head=, the name of the new head's module.")
        if check_every < 1:
            raise ConfigurationError(f"check_every={check_every} must be at least 1.")
        self._settings: dict[str, Any] = {
            "norm": _one_of("norm", norm, ("mars", "frobenius")),
            "radius": radii.to_plain(radius),
            "head": head,
            "head_radius": None if head_radius is None else radii.require(head_radius, "head_radius"),
            "include": list(include),
            "exclude": list(exclude),
            "affine": _one_of("affine", affine, ("free", "frozen")),
            "head_bias": _one_of("head_bias", head_bias, ("free", "frozen")),
            "convention": _one_of("convention", convention, ("operator", "authors")),
            "projection": _one_of("projection", projection, ("radial", "euclidean")),
        }
        self._model = model
        self._reference_dtype = reference_dtype
        self._reference_device = None if reference_device is None else torch.device(reference_device)
        self._check_every = check_every
        self._is_lazy = lazy
        self._hooks: dict[int, tuple[int, int]] = {}  # of a lazy one, by the id of the optimiser
        self._steps = 0
        self._broken: dict[torch.device, Tensor] = {}
        self._fingerprint: str | None = None
        self._build(model if reference is None else reference)

    def _build(self, source: Source) -> None:
        """Resolve the settings against the model; reads ``source`` for the weights that have a ball around them."""
        chosen = self._settings
        found = rows.layers(self._model, head=chosen["head"], convention=chosen["convention"])
        self._layers = fold(self._model, found)
        given = self._radii()
        for layer in given:
            if layer.weight.dtype not in _DTYPES:
                allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
                raise ConfigurationError(f"{layer.name} is {layer.weight.dtype}; a ball needs one of {allowed}.")
        body = [layer for layer in given if layer.role == "body" and not isinstance(layer, AdaptedLayer)]
        seen = Reference.view(source, body)
        self._measure_reference(seen, body)
        ours = isinstance(source, Reference | str | Path)  # anything else may be the trained weights themselves
        self._reference = seen.keep(body, dtype=self._reference_dtype, device=self._reference_device, copy=not ours)
        self._kernel = Chunked(chosen["projection"])
        self._balls = [self._ball(layer, of_layer) for layer, of_layer in given.items()]
        self._lazy = (
            Lazy(self._balls, self._kernel, self._reference_device, self._check_every) if self._is_lazy else None
        )
        self._plans: dict[tuple[int, int, frozenset[int]], tuple[Plan, list[Ball | UpdateBall]]] = {}

    def _radii(self) -> dict[Layer, list[float | Relative]]:
        """The radii given for every layer that is not free; a tied layer can have several: the smallest counts."""
        chosen = self._settings
        taken = list(rows.select(self._layers, include=chosen["include"], exclude=chosen["exclude"]))
        body = [layer for layer, is_taken in taken if is_taken and layer.role == "body"]
        found = dict(zip(body, radii.by_name(chosen["radius"], body), strict=True))
        if chosen["head_radius"] is not None:
            found |= {layer: [chosen["head_radius"]] for layer, is_taken in taken if is_taken and layer.role == "head"}
        still = [la for la in self._layers if la.role == "body" and la.rows.kind in ("bias", "normalisation")]
        still = still if chosen["affine"] == "frozen" else []
        if chosen["head_bias"] == "frozen":
            still += [la for la in self._layers if la.role == "head" and la.rows.kind == "bias"]
        if still:
            excluded = rows.matching([n for layer in self._layers for n in layer.names], chosen["exclude"], "exclude")
            found |= {layer: [0.0] for layer in still if excluded.isdisjoint(layer.names)}
        finite = {layer: [radius for radius in given if radius != math.inf] for layer, given in found.items()}
        adapts = any(isinstance(layer, AdaptedLayer) for layer in self._layers)  # frozen beside them: for good
        free = {la for la in finite if adapts and not isinstance(la, AdaptedLayer) and not la.weight.requires_grad}
        return {layer: given for layer, given in finite.items() if given and layer not in free}

    def _measure_reference(self, seen: Reference, layers: Sequence[Layer]) -> None:
        """The norm of each layer's reference, and how far storing it moves it: only as long as it is not rounded."""
        norm = self._settings["norm"]
        what = (norm, self._settings["convention"], set(seen))
        if not seen.rounded:
            self._measured, self._measured_what = {}, what
            for layer in layers:
                true = seen.stored(layer.name)
                stored = self._reference_dtype if self._reference_dtype and layer.rows.kind != "scale" else true.dtype
                shift = distance_between(layer, norm, true, stored)
                self._measured[layer.name] = (reference_norm(layer, norm, seen), shift)
        elif what != self._measured_what:
            raise ConfigurationError(
                f"With reference_dtype={self._reference_dtype} the exact reference is not kept, and how far it was"
                " moved is known in one norm for the layers that had a ball: build the constraint with the saved norm,"
                " convention, include, exclude and radius, then load."
            )

    def _ball(self, layer: Layer, given: Sequence[float | Relative]) -> Ball | UpdateBall:
        norm = self._settings["norm"]
        if isinstance(layer, AdaptedLayer):
            size = layer.base_norm(norm) if any(isinstance(r, Relative) for r in given) else math.nan
            return UpdateBall(layer, norm, min(r.ratio * size if isinstance(r, Relative) else r for r in given))
        if layer.role == "head":
            return Ball(layer, norm, min(r for r in given if not isinstance(r, Relative)), None)
        size, shift = self._measured[layer.name]
        radius = min(r.ratio * size if isinstance(r, Relative) else r for r in given)
        return make_ball(layer, norm, radius, size, shift, self._reference)

    # ------------------------------------------------------------------------------------------------ projecting

    def attach(self, *optimizers: Optimizer) -> None:
        """Project now, and after every step of the optimiser from now on.

        Args:
            optimizers: One, or several that together hold the constrained parameters. Wrappers such as Accelerate's
                are taken off.

        Raises:
            AttachError: The optimiser would never call the constraint, or does not hold the parameters; or there is no
                bound of its steps, which ``lazy`` needs.
        """
        inner = [inner_optimizer(optimizer) for optimizer in optimizers]
        require_parameters(inner, [ball.layer for ball in self._balls])
        for optimizer in inner if self._is_lazy else ():
            require_bounded(optimizer)
        self._plans.clear()  # an optimiser that is gone may have had the id of one of these
        self.project()
        for optimizer in inner:
            after: Any = lambda stepped, *_: self._after_step(stepped)  # noqa: E731 - wrapped in the next line
            after = torch.compiler.disable(after)  # type: ignore[no-untyped-call]  # where step() is compiled
            hook = optimizer.register_step_post_hook(after)
            if isinstance(optimizer, OnePass):
                optimizer.tether(self, hook.id)
            if self._is_lazy:
                before = optimizer.register_step_pre_hook(lambda stepping, *_: self._before_step(stepping))
                self._hooks[id(optimizer)] = (before.id, hook.id)

    def project(self) -> None:
        """Bring every constrained layer inside its ball, in place; what is inside is not touched.

        Raises:
            NonFiniteWeightError: A row holds a NaN or an infinity (on an accelerator: see ``check_every``). It is left
                as it is, all other rows are inside. Of sharded rows only the rank that holds this one raises, since a
                MARS ball costs no communication; all ranks raise for a Frobenius ball, and in :meth:`distances`.
        """
        if self._lazy:
            self._lazy.forget()
        self._project()

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._lazy:
            self._lazy.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        done = optimizer.done(self) if isinstance(optimizer, OnePass) else Done()
        self._count_broken(done.broken, torch.device("cpu"))
        settled = done.settled
        if self._lazy:
            for device, count in self._lazy.after_step(optimizer, self._hooks[id(optimizer)], settled).items():
                self._count_broken(count, device)
            settled |= self._lazy.covered(optimizer)
        self._project(optimizer, settled=settled)

    @property
    def form(self) -> object:
        """Another object whenever a ball has become another one; for :mod:`tethertune.optim`."""
        return self._balls

    @torch.no_grad()
    def held(self) -> list[Held]:
        """The balls as an optimiser of :mod:`tethertune.optim` can keep them in its own step."""
        radial = self._settings["norm"] == "frobenius" or self._settings["projection"] == "radial"
        found = [(ball, ball.in_memory(device=self._reference_device)) for ball in self._balls]
        return [
            Held(ball.layer.weight, rows[0] if radial and rows and len(rows) == 1 else None, ball.by_row)
            for ball, rows in found
        ]

    @torch.no_grad()
    def _project(self, optimizer: Optimizer | None = None, *, settled: frozenset[int] = frozenset()) -> None:
        """Project all layers, or those that an optimiser trains; not the weights whose ``id`` is among ``settled``."""
        self._steps += 1
        plan, planned = self._plan(optimizer, settled=settled)
        plan.project(self._broken)
        rest = [planned[number] for number in plan.rest]
        balls = [ball for ball in rest if isinstance(ball, Ball)]
        for update in [ball for ball in rest if isinstance(ball, UpdateBall)]:
            count = update.project()
            self._count_broken(count, count.device)
        for ball in balls:
            if ball.by_row:
                for block in ball.blocks(device=self._reference_device):
                    size = ball.size if block.unit is None else math.inf  # known in that unit alone
                    broken = self._kernel.rows(block.weight, block.centre, block.radius, size=size)
                    self._count_broken(broken, block.weight.device)
        self._project_frobenius([ball for ball in balls if not ball.by_row])
        if self._broken and (self._steps % self._check_every == 0 or torch.device("cpu") in self._broken):
            self._look()

    def _project_frobenius(self, balls: Sequence[Ball]) -> None:
        """Layers that the host sees whole one by one; the others measured first, added up in one collective call."""
        apart: list[tuple[Ball, Parts]] = []
        for ball in balls:
            parts = [(block.weight, block.centre) for block in ball.blocks(device=self._reference_device)]
            if is_sharded(ball.layer.weight) or ball.layer.weight.device.type != "cpu":
                apart.append((ball, parts))
            else:
                broken = self._kernel.frobenius(parts, ball.room, size=ball.size)
                self._count_broken(broken, ball.layer.weight.device)
        if not apart:
            return
        shares = [self._kernel.shares(parts) for _, parts in apart]
        weights = [ball.layer.weight for ball, _ in apart]
        totals = reduce_over_shards([s.sum(dim=0).to(w.device) for s, w in zip(shares, weights, strict=True)], weights)
        for (ball, pieces), share, total in zip(apart, shares, totals, strict=True):
            self._kernel.scale(pieces, ball.room, share, total)
            self._count_broken((~total[0].isfinite()).long(), total.device)

    def _plan(
        self, optimizer: Optimizer | None = None, *, settled: frozenset[int] = frozenset()
    ) -> tuple[Plan, list[Ball | UpdateBall]]:
        """What a step of an optimiser has in common with its next, and the balls that it is of.

        It is made again when a weight has moved, changed or been frozen, or when the optimiser holds more parameters.
        """
        groups = [] if optimizer is None else optimizer.param_groups
        key = (id(optimizer), sum(len(group["params"]) for group in groups), settled)
        plan, balls = self._plans.get(key, (None, []))
        if plan is None or not plan.holds():
            held = {id(parameter) for group in groups for parameter in group["params"]}
            balls = [
                ball
                for ball in self._balls
                if optimizer is None or isinstance(ball, UpdateBall) or id(ball.layer.weight) in held
            ]
            weights = [ball.layer.weight for ball in balls]
            wanted = [(w.requires_grad or optimizer is None) and id(w) not in settled for w in weights]
            rows = [
                ball.in_memory(device=self._reference_device) if taken else []
                for ball, taken in zip(balls, wanted, strict=True)
            ]
            chosen = self._settings
            plan = Plan([ball.layer for ball in balls], rows, chosen["norm"], chosen["projection"])
            # An old plan would keep weights and centres alive that nobody uses any more.
            self._plans = {k: known for k, known in self._plans.items() if known[0].holds()} | {key: (plan, balls)}
        return plan, balls

    @property
    def backend(self) -> str:
        """What brings the weights inside: ``"native"`` (C, on a CPU), ``"triton"`` (CUDA) or ``"chunked"`` (PyTorch).

        All do the same; ``chunked`` is slower. It also takes the layers that the others cannot: float64, rows with gaps
        between their weights (a transposed convolution, transformers' ``Conv1D``), batch-norm scales under the authors'
        convention, a sharded Frobenius ball, a reference on another device. ``"chunked"`` alone means that it does
        everything: there is no C compiler or no Triton (the log says why at level INFO), or no layer suits them.

        The environment variable ``TETHERTUNE_BACKEND`` forces one.

        Raises:
            ConfigurationError: The forced one cannot run here, or suits none of the layers.
        """
        with torch.no_grad():
            return self._plan()[0].backend

    # ---------------------------------------------------------------------------------------- weights not finite

    def _count_broken(self, count: int | Tensor, device: torch.device) -> None:
        if isinstance(count, Tensor) or count:
            before = self._broken.get(device)
            new = torch.as_tensor(count, device=device)
            self._broken[device] = new if before is None else before + new

    def _look(self, *, elsewhere: bool = False) -> None:
        """Raise for rows that were counted as not finite, here or ``elsewhere``, on a rank that has told of them."""
        counted = self._counted()
        self._broken.clear()
        if not counted and not elsewhere:
            return
        advice = (
            " a NaN or an infinity after the optimiser's step; it was left as it is. Go back to the last checkpoint and"
            " lower the learning rate, or find the batch that gave such a gradient."
        )
        for ball in self._balls:
            row = _broken_row(ball)
            if row is not None:
                where = (
                    f" (of this rank's part, rank {torch.distributed.get_rank()})"
                    if is_sharded(ball.layer.weight)
                    else ""
                )
                raise NonFiniteWeightError(f"Row {row} of {ball.layer.name}{where} holds{advice}")
        if any(is_sharded(ball.layer.weight) for ball in self._balls):
            raise NonFiniteWeightError(f"A row on another rank holds{advice}")

    def _counted(self) -> int:
        return sum(int(count) for count in self._broken.values())

    # ------------------------------------------------------------------------------- other copies of the network

    def on(self, model: nn.Module) -> "Constraint":
        """The same balls for another copy of the network: an average of its weights, or its weights in another dtype.

        Balls are convex, so an average of weights inside them (EMA, SWA, an interpolation) is inside as well, but for
        its rounding to stored numbers, which can leave them; a cast can too. Projecting brings it inside exactly.

        Args:
            model: A network with the same parameters, also wrapped in ``torch.optim.swa_utils.AveragedModel``.

        Returns:
            A constraint around the same reference, attached to nothing.

        Raises:
            ConfigurationError: A ball holds no number of the copy's dtype.
            PatternError: The copy lacks parameters that this constraint's patterns name.
            ReferenceMismatchError: The copy is of another network.

        Example:
            >>> from torch.optim.swa_utils import AveragedModel
            >>> model = nn.Linear(4, 2)
            >>> constraint = Constraint(model, radius=0.5)
            >>> average = AveragedModel(model)
            >>> held = constraint.on(average)
            >>> for _ in range(3):
            ...     with torch.no_grad():
            ...         _ = model.weight.add_(1)
            ...     constraint.project()
            ...     average.update_parameters(model)
            ...     held.project()
            >>> held.distances()["weight"].value <= 0.5
            True
        """
        other = copy.copy(self)
        other._model, other._steps, other._broken = model, 0, {}
        other._build(self._reference)
        return other

    # -------------------------------------------------------------------------------------------------- reporting

    @torch.no_grad()
    def distances(self) -> dict[str, Distance]:
        """How far every constrained layer is from its reference now, by name, computed in float64.

        With a ``reference_dtype`` that is not exact, the values are upper bounds. On sharded weights this is a
        collective call.

        Raises:
            NonFiniteWeightError: A step since the last look met a row that is not finite.
        """
        counted = torch.tensor([self._counted()], dtype=torch.float64)
        weights = [ball.layer.weight for ball in self._balls]
        measured = [self._measure(ball) for ball in self._balls]
        measured = [torch.cat([values, counted.to(values.device)]) for values in measured]
        totals = reduce_over_shards(measured, weights, "sum")
        largest = reduce_over_shards(measured, weights, "max")
        self._look(elsewhere=any(total[2] for total in totals))
        return {
            ball.layer.name: self._distance(ball, (most if ball.by_row else total)[0].item(), int(total[1]))
            for ball, total, most in zip(self._balls, totals, largest, strict=True)
        }

    def _measure(self, ball: Ball | UpdateBall) -> Tensor:
        """The local rows' largest distance and how many are at their radius, or the sum of squares; (2,)."""
        measured = ball.distances(self._kernel, device=self._reference_device).to(local(ball.layer.weight).device)
        if not ball.by_row:
            return torch.stack([measured.sum(), measured.new_zeros(())])
        at_radius = (measured >= AT_RADIUS * ball.radius) & (measured > 0)
        return torch.stack([measured.max() if len(measured) else measured.sum(), at_radius.sum().double()])

    def _distance(self, ball: Ball | UpdateBall, value: float, active: int) -> Distance:
        count = ball.layer.rows.shape(ball.layer.weight)[0]
        if not ball.by_row:
            value = math.sqrt(value) + (0.0 if ball.shift is None else float(ball.shift))
            active = count if 0 < value >= AT_RADIUS * ball.radius else 0
        return Distance(value, ball.radius, self._settings["norm"], ball.layer.role, active, count)

    @torch.no_grad()
    def memory(self) -> Memory:
        """What the constraint costs in memory, now that its tables stand."""
        plan, balls = self._plan()
        device = self._reference_device
        held, on_cpu = self._reference.nbytes(), all(local(b.layer.weight).device.type == "cpu" for b in self._balls)
        rest = [[(b.weight, b.centre) for b in balls[number].blocks(device=device)] for number in plan.rest]
        tables = [known.nbytes for known, _ in self._plans.values()]
        return Memory(
            reference=sum(size for kind, size in held.items() if kind != "mapped" and (on_cpu or kind != "cpu")),
            host=0 if on_cpu else held.get("cpu", 0),
            mapped=held["mapped"],
            tables=sum(ball.nbytes for ball in self._balls) + sum(tables),
            scratch=self._kernel.nbytes(),
            passing=max(map(working_set, rest), default=0),
        )

    def summary(self) -> str:
        """What is constrained, what is free, and what it costs in memory, in a few lines."""
        distances = self.distances()
        at_radius = sum(d.active_rows > 0 for d in distances.values())
        head, norm = self._settings["head"] or "none", self._settings["norm"]
        count = f"{len(self._balls)} of {len(self._layers)} tensors constrained"
        lines = [f"{count}, head {head}, norm {norm}, {at_radius} at their radius"]
        held = {ball.layer for ball in self._balls}
        free: dict[str, list[str]] = {}
        for layer in self._layers:
            if layer not in held:
                free.setdefault("head" if layer.role == "head" else layer.rows.kind, []).append(layer.name)
        if free:
            named = {"map": "linear maps", "normalisation": "normalisation", "bias": "biases", "head": "of the head"}
            lines.append("free: " + ", ".join(f"{len(n)} {named.get(kind, kind)}" for kind, n in free.items()))
        if "other" in free:
            lines.append("of unknown modules, constrain with include=: " + ", ".join(free["other"]))
        lines.append(f"memory: {self.memory()}")
        return "\n".join(lines)

    # ----------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The settings and the reference's fingerprint: plain numbers and strings, never the weights.

        On sharded weights this is a collective call.
        """
        if self._fingerprint is None:
            self._fingerprint = self._reference.fingerprint()
            if adapted := base_weights(ball.layer for ball in self._balls):
                self._fingerprint += f"+{adapted.fingerprint()}"
        return {"format": 1, "settings": dict(self._settings), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the settings of a saved constraint, around the same reference.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ReferenceMismatchError: This constraint's reference is not the saved one's, for instance because it was
                built from a fine-tuned checkpoint.
            ConfigurationError: The saved settings do not fit this model.

        Whatever is raised, nothing is changed then.
        """
        before = vars(self).copy()
        self._settings, self._fingerprint = {"head_bias": "free", **state["settings"]}, None  # 0.1.0 had none
        try:
            self._build(self._reference)
            saved = state["fingerprint"]
            if self.state_dict()["fingerprint"] != saved != self._reference.fingerprint(as_given=True):
                raise ReferenceMismatchError(
                    "The reference is not the one that this state was saved with: build the constraint with"
                    " reference= the original pre-trained weights (before loading the fine-tuned ones), then load."
                )
        except TethertuneError:
            vars(self).update(before)
            raise


def _broken_row(ball: Ball | UpdateBall) -> int | None:
    """The number of the first row that is not finite, of this rank's part."""
    if isinstance(ball, Ball):
        finite = ball.layer.rows.matrix(local(ball.layer.weight).detach()).isfinite().all(dim=1)
    elif is_sharded(ball.layer.weight):  # to measure it would be a collective call
        finite = local(ball.layer.weight).detach().isfinite().all(dim=1)
    else:
        finite = ball.distances().isfinite()
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def _one_of(argument: str, given: str, allowed: Sequence[str]) -> str:
    if given not in allowed:
        raise ConfigurationError(
            f"{argument}={given!r} is not known: use {' or '.join(map(repr, allowed))}.{did_you_mean(given, allowed)}"
        )
    return given
