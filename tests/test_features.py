import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from tethertune.errors import ConfigurationError, PatternError, ReferenceMismatchError
from tethertune.features import FeaturePenalty, attention_weights, channel_losses

torch.set_num_threads(1)

KINDS = ["softmax", "zscore", "sigmoid", "none"]


def network(seed=0, inplace=False):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.SiLU(inplace=inplace),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )


class Tokens(nn.Module):
    """(n, tokens, 5) to logits by way of a map (n, tokens, 3)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


def wander(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


IMAGES = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 3, 1, 0])


# ------------------------------------------------------------------------------------------------ attention weights


def test_attention_weights_by_hand():
    losses = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    exponents = losses.exp()
    torch.testing.assert_close(attention_weights(losses, "softmax"), exponents / exponents.sum())
    z = (losses - 2) / 3.5**0.5
    torch.testing.assert_close(attention_weights(losses, "zscore"), (z / 5).exp() / (z / 5).exp().sum())
    torch.testing.assert_close(attention_weights(losses, "sigmoid"), 1 / (1 + (-losses).exp()) / 4)
    torch.testing.assert_close(attention_weights(losses, "none"), torch.full((4,), 0.25, dtype=torch.float64))


@settings(deadline=None)
@given(losses=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), kind=st.sampled_from(KINDS))
def test_attention_weights_are_positive_ordered_and_sum_to_one(losses, kind):
    losses = torch.tensor(losses)
    weights = attention_weights(losses, kind)
    assert (weights >= 0).all()
    if kind == "sigmoid":
        assert weights.sum() <= 1 + 1e-6
    else:
        assert weights.sum().item() == pytest.approx(1, rel=1e-5)
    order = losses.argsort()
    assert (weights[order].diff() >= -1e-6).all()


@pytest.mark.parametrize("kind", ["softmax", "zscore"])
def test_equally_important_channels_get_equal_weights(kind):
    torch.testing.assert_close(attention_weights(torch.full((7,), 0.1), kind), torch.full((7,), 1 / 7))


@pytest.mark.parametrize("losses", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.0, float("nan")])])
def test_an_importance_must_be_finite_and_of_one_axis(losses):
    with pytest.raises(ConfigurationError, match=r"must be finite and of shape \(channels,\)"):
        attention_weights(losses, "softmax")


def test_an_unknown_attention_is_refused():
    with pytest.raises(ConfigurationError, match=r"attention='sofmax' is not known.* Did you mean 'softmax'"):
        attention_weights(torch.zeros(2), "sofmax")


# --------------------------------------------------------------------------------------------------- channel losses


def by_zeroing_the_weights(model, convolution, norm):
    """Leave-one-out, by zeroing what makes each channel of a convolution followed by batch norm."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        whole = cross_entropy(model(IMAGES), LABELS)
        losses = []
        for c in range(model[convolution].out_channels):
            ablated = copy.deepcopy(model)
            ablated[norm].weight[c] = 0
            ablated[norm].bias[c] = 0
            losses.append(cross_entropy(ablated(IMAGES), LABELS) - whole)
    return torch.stack(losses).double()


@pytest.mark.parametrize("inplace", [False, True])
def test_channel_losses_are_those_without_the_channel(inplace):
    model = network(inplace=inplace)
    wander(model)
    found = channel_losses(model, "1", [(IMAGES, LABELS)], cross_entropy)
    torch.testing.assert_close(found, by_zeroing_the_weights(model, 0, 1), rtol=1e-5, atol=1e-6)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", [1, 2, 5])
def test_the_tail_gives_what_the_whole_network_gives(layer, inplace):
    model = network(inplace=inplace)
    wander(model)
    batches = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
    whole = channel_losses(model, str(layer), batches, cross_entropy)
    tail = channel_losses(model, str(layer), batches, cross_entropy, tail=model[layer + 1 :])
    torch.testing.assert_close(tail, whole)
    assert whole.shape == (3,)
    assert whole.dtype is torch.float64


def test_channel_losses_average_over_samples():
    model = network()
    wander(model)
    parts = [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])]
    torch.testing.assert_close(
        channel_losses(model, "1", parts, cross_entropy),
        channel_losses(model, "1", [(IMAGES, LABELS)], cross_entropy),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_channels_of_tokens_are_last():
    model, inputs = Tokens(), torch.randn(4, 7, 5)
    found = channel_losses(model, "embed", [(inputs, LABELS[:4] % 2)], cross_entropy)
    with torch.no_grad():
        features = model.embed(inputs).mean(1)
        whole = cross_entropy(model.head(features), LABELS[:4] % 2)
        features[:, 1] = 0
        without = cross_entropy(model.head(features), LABELS[:4] % 2)
    assert found.shape == (3,)
    assert found[1].item() == pytest.approx((without - whole).item(), abs=1e-6)


def test_channel_losses_leave_the_model_as_it_was():
    model = network().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    channel_losses(model, "2", [(IMAGES, LABELS)], cross_entropy)
    assert [module.training for module in model] == [True, False, True, True, True, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_channel_losses_say_what_is_wrong():
    with pytest.raises(ConfigurationError, match="no module '11'"):
        channel_losses(network(), "11", [(IMAGES, LABELS)], cross_entropy)
    with pytest.raises(ConfigurationError, match="no batch"):
        channel_losses(network(), "1", [], cross_entropy)
    model = Tokens()
    model.unused = nn.Linear(1, 1)
    with pytest.raises(ConfigurationError, match="unused does not run"):
        channel_losses(model, "unused", [(torch.randn(2, 7, 5), LABELS[:2])], cross_entropy)


# -------------------------------------------------------------------------------------------------- feature penalty


def two_channels():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1.0]).reshape(2, 1, 1, 1))
    return model


@pytest.mark.parametrize(
    ("attention", "weights"),
    [("softmax", (0.25, 0.75)), ("zscore", (0.401312, 0.598688)), ("sigmoid", (0.25, 0.375)), ("none", (0.5, 0.5))],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_value_by_hand(attention, weights, reduction):
    model = two_channels()
    importance = None if attention == "none" else {"0": torch.tensor([0.0, math.log(3)])}
    penalty = FeaturePenalty(
        model, layers=["0"], strength=2.0, attention=attention, importance=importance, reduction=reduction
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 4.0]).reshape(2, 1, 1, 1))  # d = 1x and 3x
    inputs = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 0.0]]], [[[0.0, 2.0]]]])  # squares: 5, 9, 4 over 2 positions
    model(inputs)
    positions = (5 + 9 + 4) / 2
    expected = 2.0 * positions * (weights[0] * 1 + weights[1] * 9) / (3 if reduction == "mean" else 1)
    assert penalty(inputs).item() == pytest.approx(expected, rel=1e-5)


def moved(**options):
    """A network that has moved, its penalty, and the two maps."""
    model = network().eval()
    reference = copy.deepcopy(model)
    penalty = FeaturePenalty(model, layers=["2"], **options)
    wander(model)
    return model, penalty, model[:3](IMAGES).detach(), reference[:3](IMAGES).detach()


def test_it_is_the_published_code_of_delta_at_the_translated_strength():
    losses, alpha = torch.tensor([0.1, 0.7, -0.2]), 0.3
    model, penalty, new, old = moved(
        strength=alpha * 3 / 2, attention="zscore", importance={"2": losses}, reduction="sum"
    )
    model(IMAGES)
    weights = (((losses - losses.mean()) / losses.std(correction=0)) / 5).softmax(0)
    per_channel = (new - old).flatten(2).norm(dim=2).square() / (3 * 3)
    expected = alpha * 0.5 * (3 * weights * per_channel).sum()
    torch.testing.assert_close(penalty(IMAGES), expected)


def test_it_is_the_comparison_of_gouk_et_al_at_the_same_strength():
    losses, alpha = torch.tensor([0.1, 0.7, -0.2]), 0.3
    model, penalty, new, old = moved(strength=alpha, attention="sigmoid", importance={"2": losses})
    model(IMAGES)
    expected = alpha * (losses.sigmoid().reshape(1, 3, 1, 1) * (new - old).square()).mean()
    torch.testing.assert_close(penalty(IMAGES), expected)


def test_maps_of_two_and_three_dimensions_and_several_layers():
    model, inputs = Tokens(), torch.randn(4, 7, 5)
    reference = copy.deepcopy(model)
    importance = {"embed": torch.tensor([0.0, 1.0, 2.0]), "head": torch.tensor([3.0, 1.0])}
    penalty = FeaturePenalty(model, layers=["embed", "head"], strength=1.0, importance=importance)
    wander(model)
    model(inputs)
    with torch.no_grad():
        d = model.embed(inputs) - reference.embed(inputs)
        e = model(inputs) - reference(inputs)
    expected = (d.square() * importance["embed"].softmax(0)).sum(2).mean()
    expected += (e.square() * importance["head"].softmax(0)).sum(1).mean()
    torch.testing.assert_close(penalty(inputs), expected)


def test_the_head_term():
    model = network()
    penalty = FeaturePenalty(model, layers=["2"], strength=0.0, attention="none", head="6", head_strength=0.5)
    model(IMAGES)
    value = penalty(IMAGES)
    torch.testing.assert_close(value, 0.5 * model[6].weight.square().sum())
    value.backward()
    torch.testing.assert_close(model[6].weight.grad, model[6].weight.detach())
    assert model[6].bias.grad is None


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", ["0", "1", "2"])
def test_the_gradient_is_that_of_the_formula_in_the_trained_network_only(layer, inplace):
    model = network(inplace=inplace).eval()
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    penalty = FeaturePenalty(model, layers=[layer], strength=3.0, attention="none")
    wander(model)
    wander(plain)
    model(IMAGES)
    penalty(IMAGES).backward()

    maps = [part[: int(layer) + 1](IMAGES) for part in (plain, reference)]
    (3.0 * (maps[0] - maps[1].detach()).square().mean()).backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None, name
        else:
            torch.testing.assert_close(found.grad, expected.grad)
    assert model[0].weight.grad.any()
    assert all(not p.requires_grad and p.grad is None for p in penalty._reference.parameters())


def test_the_reference_network_stays_as_it_was():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    penalty = FeaturePenalty(model, layers=["2"], strength=1.0, attention="none")
    wander(model)
    for _ in range(2):
        model(IMAGES)
        penalty(IMAGES).backward()
    assert not penalty._reference.training
    assert all(torch.equal(before[name], tensor) for name, tensor in penalty._reference.state_dict().items())
    assert model.training
    assert model[1].num_batches_tracked == 2


def test_an_unmoved_network_costs_nothing():
    model = network().eval()
    penalty = FeaturePenalty(model, layers=["2"], strength=1.0, attention="none")
    model(IMAGES)
    value = penalty(IMAGES)
    assert value.item() == 0
    value.backward()
    assert not model[0].weight.grad.any()


def test_nothing_is_kept_without_gradients_nor_after_the_call():
    model = network()
    penalty = FeaturePenalty(model, layers=["2"], strength=1.0, attention="none")
    with torch.no_grad():
        model(IMAGES)
    assert penalty._taps["2"].output is None
    with pytest.raises(ConfigurationError, match="2 has not run with gradients"):
        penalty(IMAGES)
    model(IMAGES)
    assert penalty._taps["2"].output is not None
    penalty(IMAGES)
    assert penalty._taps["2"].output is None
    with pytest.raises(ConfigurationError, match="2 has not run with gradients"):
        penalty(IMAGES)


def test_remove_takes_the_hooks_off():
    model = network()
    penalty = FeaturePenalty(model, layers=["1", "2"], strength=1.0, attention="none")
    assert len(model[1]._forward_hooks) == len(model[2]._forward_hooks) == 1
    model(IMAGES)
    penalty.remove()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ConfigurationError, match="has not run"):
        penalty(IMAGES)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_of_the_model_is_free_and_a_copy_of_both_works(duplicate):
    model = network().eval()
    penalty = FeaturePenalty(model, layers=["2"], strength=1.0, attention="none")
    model(IMAGES)  # a map with its graph is being kept
    alone = duplicate(model)
    alone(IMAGES)
    (tap,) = alone[2]._forward_hooks.values()
    assert tap.output is None
    assert penalty(IMAGES).item() == 0

    model(IMAGES)
    clone, its_penalty = duplicate((model, penalty))
    wander(clone)
    clone(IMAGES)
    assert its_penalty(IMAGES).item() > 0
    assert penalty(IMAGES).item() == 0
    its_penalty.remove()
    assert not clone[2]._forward_hooks
    assert model[2]._forward_hooks


def test_a_model_wrapped_afterwards_still_feeds_the_hooks():
    model = network().eval()
    penalty = FeaturePenalty(model, layers=["2"], strength=1.0, attention="none")
    wrapped = nn.DataParallel(model)
    wander(model)
    wrapped(IMAGES)
    assert penalty(IMAGES).item() > 0


def test_the_model_may_change_dtype_under_autocast():
    model = network().eval()
    penalty = FeaturePenalty(model, layers=["2"], strength=1.0, attention="none")
    wander(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IMAGES)
        value = penalty(IMAGES)
    model(IMAGES)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(penalty(IMAGES).item(), rel=0.05)


def test_options_of_the_forward_are_passed_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2, bias=False)

        def forward(self, x, *, scale):
            return self.fc(x * scale)

    model = Scaled()
    penalty = FeaturePenalty(model, layers=["fc"], strength=1.0, attention="none")
    with torch.no_grad():
        model.fc.weight.add_(1.0)
    inputs = torch.ones(2, 3)
    model(inputs, scale=2.0)
    assert penalty(inputs, scale=2.0).item() == pytest.approx(36.0, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"layers": ["layer"]}, r"no module 'layer'"),
        ({"layers": []}, r"layers=\[\] is not allowed"),
        ({"layers": "2"}, r"layers='2' is not allowed"),
        ({"strength": -1.0}, r"strength=-1.0"),
        ({"strength": float("inf")}, r"strength=inf"),
        ({"reduction": "max"}, r"reduction='max' is not known"),
        ({"attention": "hard", "importance": {"2": torch.zeros(3)}}, r"attention='hard' is not known"),
        ({"attention": "softmax"}, r"attention='softmax' needs the importance of each layer"),
        ({"attention": "softmax", "importance": {"1": torch.zeros(3)}}, r"layers are \['2'\], importance has \['1'\]"),
        ({"importance": {"2": torch.zeros(3)}}, r"attention='none' takes no importance"),
        ({"head_strength": 1.0}, r"head_strength=1.0 needs head="),
    ],
)
def test_options_are_checked(options, error):
    model = network()
    with pytest.raises(ConfigurationError, match=error):
        FeaturePenalty(model, **{"layers": ["2"], "strength": 1.0, "attention": "none", **options})
    assert not any(module._forward_hooks for module in model.modules())


def test_a_wrong_name_gets_a_suggestion():
    with pytest.raises(ConfigurationError, match=r"no module 'embedd'. Did you mean 'embed'"):
        FeaturePenalty(Tokens(), layers=["embedd"], strength=1.0, attention="none")
    with pytest.raises(PatternError, match="Did you mean 'head'"):
        FeaturePenalty(Tokens(), layers=["embed"], strength=1.0, attention="none", head="heat", head_strength=1.0)


def test_maps_must_fit():
    model = network().eval()
    wrong = FeaturePenalty(model, layers=["2"], strength=1.0, importance={"2": torch.zeros(5)})
    model(IMAGES)
    with pytest.raises(ConfigurationError, match=r"importance of 2 is for 5 channels, its map has 3"):
        wrong(IMAGES)
    model(IMAGES)
    with pytest.raises(ConfigurationError, match=r"shape \(6, 3, 3, 3\), the reference network's \(2, 3, 3, 3\)"):
        wrong(IMAGES[:2])
    cube = nn.Sequential(nn.Conv3d(1, 2, 1))
    penalty = FeaturePenalty(cube, layers=["0"], strength=1.0, attention="none")
    cube(torch.ones(1, 1, 2, 2, 2))
    with pytest.raises(ConfigurationError, match=r"map of 0 has shape \(1, 2, 2, 2, 2\); allowed are"):
        penalty(torch.ones(1, 1, 2, 2, 2))


def test_a_layer_must_return_one_tensor():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 2)

        def forward(self, x):
            return self.rnn(x)[0]

    model = Recurrent()
    penalty = FeaturePenalty(model, layers=["rnn"], strength=1.0, attention="none")
    model(torch.ones(1, 2, 3))
    with pytest.raises(ConfigurationError, match="rnn returns a tuple"):
        penalty(torch.ones(1, 2, 3))


def test_a_state_dict_carries_settings_and_weights_around_the_same_network(tmp_path):
    model = network().eval()
    start = copy.deepcopy(model)
    importance = {"2": torch.tensor([0.0, 1.0, 3.0])}
    options = {"layers": ["2"], "head": "6"}
    saved = FeaturePenalty(model, strength=0.3, importance=importance, reduction="sum", head_strength=0.1, **options)
    wander(model)
    torch.save(saved.state_dict(), tmp_path / "penalty.pt")
    state = torch.load(tmp_path / "penalty.pt", weights_only=True)

    with torch.no_grad():
        start[6].weight.zero_()  # another head is no other reference
    resumed = FeaturePenalty(start, strength=1.0, attention="none", **options)
    start.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    model(IMAGES)
    start(IMAGES)
    torch.testing.assert_close(resumed(IMAGES), saved(IMAGES), rtol=0, atol=0)
    assert resumed.state_dict()["settings"] == state["settings"]

    with pytest.raises(ReferenceMismatchError, match="reference network is not the one"):
        FeaturePenalty(model, strength=1.0, attention="none", **options).load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"is for layers \['2'\], this one for \['1'\]"):
        FeaturePenalty(model, layers=["1"], strength=1.0, attention="none", head="6").load_state_dict(state)
