import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tethertune.errors import ConfigurationError
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.optimisers import build, lr_factor

torch.set_num_threads(1)

lengths = st.integers(1, 500)


def built(name, parameters, lr=0.1, **values):
    config = FinetuneConfig("lite0", "fashion", optimizer=name, lr=lr, **values)
    return build(config, [{"params": [parameter], "lr": lr} for parameter in parameters])


def trained(name, gradients, start, **values):
    """Where a weight is after one step for each of its gradients."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = built(name, [weight], **values)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def adam(gradients, weight, *, lr=0.1, largest=False, decay=0.0, decoupled=False):
    """Adam as its paper has it, in float64; with the largest second moment so far it is AMSGrad."""
    first = second = bound = torch.zeros((), dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        whole = gradient if decoupled else gradient + decay * weight
        weight = weight * (1 - lr * decay) if decoupled else weight
        first, second = 0.9 * first + 0.1 * whole, 0.999 * second + 0.001 * whole**2
        bound = torch.maximum(bound, second) if largest else second
        weight = weight - lr * (first / (1 - 0.9**step)) / ((bound / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize(
    ("name", "options"), [("adam", {}), ("amsgrad", {"largest": True}), ("AdamW", {"decoupled": True})]
)
def test_the_adams_are_those_of_their_papers(name, options, decay):
    random = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=random)
    gradients = [scale * torch.randn(3, 4, generator=random) for scale in (10, 1, 0.1, 0.01)]
    found = trained(name, gradients, start, weight_decay=decay)
    wanted = adam([gradient.double() for gradient in gradients], start.double(), decay=decay, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_sgd_has_a_momentum_of_0_9():
    gradients = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])]
    found = trained("sgd", gradients, torch.zeros(2), lr=0.1)
    torch.testing.assert_close(found, -0.1 * (gradients[0] + (0.9 * gradients[0] + gradients[1])))


@pytest.mark.parametrize("name", ["amsgrad", "adam", "adamw", "sgd"])
def test_its_own_optimisers_are_fused(name):
    assert built(name, [torch.nn.Parameter(torch.ones(2))]).defaults["fused"]


@pytest.mark.parametrize("name", ["sgd", "Rprop", "lion", "NAdam"])
def test_each_group_keeps_its_learning_rate(name):
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    config = FinetuneConfig("lite0", "fashion", optimizer=name, lr=0.1)
    groups = [{"params": [weight], "lr": lr} for weight, lr in zip(weights, (0.1, 0.2), strict=True)]
    optimizer = build(config, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert [group["params"][0] for group in optimizer.param_groups] == weights
    assert not optimizer.state
    assert all(weight.eq(1).all() for weight in weights)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adm", r"--optimizer adm is not known: use amsgrad, adam, adamw, sgd, .*Did you mean 'adam'"),
        ("optimizer", "--optimizer optimizer is not known"),
        ("LBFGS", r"--optimizer LBFGS cannot be used in a plain training loop \(.*closure"),
        ("sparseadam", r"cannot be used in a plain training loop \(.*dense gradients"),
    ],
)
def test_what_is_unknown_or_needs_another_loop_is_refused(name, told):
    with pytest.raises(ConfigurationError, match=told):
        built(name, [torch.nn.Parameter(torch.ones(2, 2))])


@given(lengths)
def test_the_steps_schedule_halves_exactly_the_last_third(steps):
    factors = [lr_factor("step", step, steps) for step in range(steps)]
    assert factors == [1.0] * math.ceil(2 * steps / 3) + [0.5] * (steps // 3)


@given(lengths)
def test_the_cosine_falls_from_1_to_nearly_0_and_its_mean_is_about_a_half(steps):
    factors = [lr_factor("cosine", step, steps) for step in range(steps)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert sum(factors) == pytest.approx((steps + 1) / 2)
    assert lr_factor("cosine", steps, steps) == pytest.approx(0)


@given(lengths)
def test_constant_is_constant(steps):
    assert {lr_factor("constant", step, steps) for step in range(steps)} == {1.0}
