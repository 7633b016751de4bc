"""The table that the C optimisers step: what it takes, when it still holds, and one step by the formulae."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tethertune import norms
from tethertune.kernels import library
from tethertune.kernels.one_pass import Held, Rule, StepTable, state_suits, suits
from tethertune.kernels.stretches import Stretches

torch.set_num_threads(1)

try:
    library.load()
except library.CannotCompileError as error:
    pytestmark = pytest.mark.skip(reason=f"no C kernels: {error}")

ADAMW, SGD = 1, 2


def parameter(*shape, seed=0, like=None):
    random = torch.Generator().manual_seed(seed)
    made = nn.Parameter(torch.randn(shape, generator=random) if like is None else like)
    made.grad = torch.empty_like(made).copy_(torch.randn(made.shape, generator=random))
    return made


def ball(p, radius, *, by_row=True, rows=None):
    """Around 0, on the memory of the parameter."""
    W = p.detach().view(p.shape if by_row else (1, -1)) if rows is None else rows
    return Held(p, Stretches(W, None, torch.full((len(W),), radius, dtype=torch.float64)), by_row)


def table(*parameters, balls=(), states=None, names=(), fresh=()):
    return StepTable(parameters, states or {}, names, {id(held.parameter): held for held in balls}, fresh)


def momentum(*parameters):
    return {p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters}


def test_what_c_can_step_is_float32_on_the_cpu_without_gaps_with_a_gradient_in_the_same_order():
    last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert suits(parameter())
    for p in (parameter(3, 4), parameter(like=last), parameter(like=torch.randn(3, 4).t())):
        assert suits(p)
        p.grad = p.grad.to_sparse()
        assert not suits(p)
        p.grad = None
        assert not suits(p)
    W = torch.randn(3, 4)
    for unfit in (W.double(), W[:, :2], W[:, :1].expand(3, 4), W[:0]):
        assert not suits(parameter(like=unfit))
    other_order, subclass = parameter(like=last), parameter(3)
    other_order.grad = other_order.grad.contiguous()
    assert not suits(other_order)
    subclass.__class__ = type("Subclass", (nn.Parameter,), {})
    assert not suits(subclass)
    with torch.inference_mode():
        assert not suits(parameter(3))


def test_a_state_must_be_like_the_parameter_and_count_in_float32():
    p, names = parameter(3, 4), ("step", "exp_avg")
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 4)}
    assert state_suits(p, state, names)
    assert state_suits(p, {}, ())
    assert not state_suits(p, {}, names)
    for wrong in (torch.tensor(1), torch.ones(2), None):
        assert not state_suits(p, state | {"step": wrong}, names), wrong
    Z = torch.zeros(3, 4)
    for wrong in (Z.t(), Z.t().contiguous().t(), Z.flatten(), Z.bfloat16(), Z.to("meta")):
        assert not state_suits(p, state | {"exp_avg": wrong}, names), wrong


BALLS = ["none", "mars", "frobenius"]
OPTIONS = {
    "lr": st.floats(1e-3, 1.0),
    "decay": st.floats(0.0, 0.5),
    "momentum": st.floats(0.1, 0.9),
    "dampening": st.floats(0.0, 0.9),
    "nesterov": st.booleans(),
    "maximize": st.booleans(),
}


@given(st.fixed_dictionaries(OPTIONS), st.integers(1, 5), st.integers(1, 40), st.sampled_from(BALLS))
@settings(max_examples=100, deadline=None)
def test_two_steps_of_sgd_by_the_formulae(options, rows, columns, norm):
    p = parameter(rows, columns)
    states, radius = momentum(p), 1.5  # a row is scaled to within 2**-15 of it
    states[p]["momentum_buffer"].fill_(math.nan)
    held = [] if norm == "none" else [ball(p, radius, by_row=norm == "mars")]
    made = table(p, balls=held, states=states, names=("momentum_buffer",), fresh={id(p)})
    W, buffer = p.detach().double(), None
    for step in range(2):
        p.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(step))
        G = p.grad.double() * (-1 if options["maximize"] else 1) + options["decay"] * W
        buffer = G if buffer is None else options["momentum"] * buffer + (1 - options["dampening"]) * G
        W = W - options["lr"] * (G + options["momentum"] * buffer if options["nesterov"] else buffer)
        if norm != "none":
            sizes = norms.row_sums(W).unsqueeze(1) if norm == "mars" else norms.frobenius(W)
            W = W * (radius / sizes).clamp(max=1)
        assert made.ready()
        assert made.step(Rule(kind=SGD, **options)) == 0
        torch.testing.assert_close(p.detach().double(), W, rtol=1e-5, atol=radius * 2**-13)
    torch.testing.assert_close(states[p]["momentum_buffer"].double(), buffer, rtol=1e-5, atol=radius * 2**-13)
    if norm != "none":
        own = p.detach().double()
        assert float(norms.mars(own) if norm == "mars" else norms.frobenius(own)) <= radius


def test_adamw_finds_each_part_of_its_state():
    p, other = parameter(4, 7), parameter(4, 7)
    theirs = torch.optim.AdamW([other], lr=0.1, amsgrad=True, foreach=False)
    names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    states = {p: {name: torch.zeros(()) if name == "step" else torch.zeros_like(p) for name in names}}
    made = table(p, states=states, names=names)
    for scale in (3.0, 1.0):
        p.grad.mul_(scale)
        other.grad.copy_(p.grad)
        theirs.step()
        assert made.ready()
        made.step(Rule(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.01, kind=ADAMW))
        torch.testing.assert_close(p, other)
    for name in names:
        torch.testing.assert_close(states[p][name], theirs.state[other][name])


def test_balls_elsewhere_or_with_gaps_are_left_to_others_and_layers_come_first():
    row, layer, copied, gaps, unknown, free = (parameter(3, 4, seed=seed) for seed in range(6))
    wide = torch.randn(3, 8)
    gaps.data = wide[:, :4]
    balls = [
        ball(row, 0.1),
        ball(layer, 0.1, by_row=False),
        ball(copied, 0.1, rows=copied.detach().clone()),
        ball(gaps, 0.1, rows=wide[:, :4]),
        Held(unknown, None, by_row=True),
    ]
    given_ = (row, layer, copied, unknown, free)
    made = table(*given_, balls=balls)
    assert made.settled == {id(row), id(layer)}
    assert made.parameters[0] is layer
    assert set(map(id, made.parameters)) == set(map(id, given_))
    assert table(gaps, balls=balls).settled == frozenset()
    expected = {id(p): (p - 0.5 * p.grad).detach() for p in (copied, unknown, free)}
    versions = [p._version for p in given_]
    assert made.ready()
    assert made.step(Rule(lr=0.5, kind=SGD)) == 0
    for p in (copied, unknown, free):
        torch.testing.assert_close(p.detach(), expected[id(p)])
    assert all(p._version > before for p, before in zip(given_, versions, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda p, _: setattr(p, "grad", None),
        lambda p, _: setattr(p, "grad", torch.randn(4, 3).t()),
        lambda p, _: setattr(p, "grad", p.grad.to_sparse()),
        lambda p, _: setattr(p, "data", p.detach().clone()),
        lambda p, states: states[p].update(momentum_buffer=torch.zeros_like(p)),
        lambda p, states: states[p]["momentum_buffer"].set_(torch.zeros(3, 4)),
        lambda p, states: states.update({p: dict(states[p])}),
        lambda p, states: states[p].clear(),
        lambda _, states: states.clear(),
    ],
)
def test_a_table_holds_with_new_gradients_and_not_where_anything_else_has_moved(change):
    p = parameter(3, 4)
    states = momentum(p)
    made = table(p, states=states, names=("momentum_buffer",))
    assert made.ready()
    p.grad = torch.randn(3, 4)
    assert made.ready()
    change(p, states)
    assert not made.ready()


def test_rows_that_are_not_finite_are_left_counted_and_named():
    fine, broken = parameter(3, 4, seed=1), parameter(5, 4, seed=2)
    broken.grad[1, 2], broken.grad[3, 0] = math.nan, math.inf
    made = table(fine, broken, balls=[ball(fine, 0.1), ball(broken, 0.1)])
    assert made.ready()
    assert made.step(Rule(lr=1.0, kind=SGD)) == 2
    assert made.broken() == {id(broken): 2}
    sums = norms.row_sums(broken.detach())
    assert (sums <= 0.1).tolist() == [True, False, True, False, True]
    assert float(norms.mars(fine.detach())) <= 0.1
