"""One ball a layer, on layers whose rows lie in memory in every way, against distances taken element by element."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tethertune import rows
from tethertune.balls import Ball, distance_between, make_ball, reference_norm
from tethertune.errors import ConfigurationError
from tethertune.kernels.chunked import Chunked
from tethertune.reference import Reference

torch.set_num_threads(1)

NORMS = pytest.mark.parametrize("norm", ["mars", "frobenius"])
KERNEL = Chunked("radial")
MODULES = {
    "linear": lambda: nn.Linear(5, 4),
    "convolution": lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
    "scale": lambda: nn.BatchNorm2d(5),
}
LAYERS = [("linear", "operator"), ("convolution", "operator"), ("transposed", "operator"), ("depthwise", "authors")]
EVERY = pytest.mark.parametrize(("kind", "convention"), [*LAYERS, ("scale", "authors")])


def layer_of(kind, convention="operator", dtype=torch.float32):
    torch.manual_seed(0)
    module = MODULES[kind]().to(dtype)
    with torch.no_grad():
        module.weight.normal_()
        if kind == "scale":
            module.running_var.uniform_(0.5, 2)
    return rows.layers(module, convention=convention)[0]


def ball_of(layer, norm="mars", radius=0.5, stored=None):
    """As a constraint makes one."""
    exact = Reference.view(layer.module, [layer])
    shift = distance_between(layer, norm, exact.stored(layer.name), stored or layer.weight.dtype)
    return make_ball(layer, norm, radius, reference_norm(layer, norm, exact), shift, exact.keep([layer], dtype=stored))


def matrix(layer, tensor):
    """The rows by the definition: for a transposed convolution all that reach one output channel of one group."""
    tensor = tensor.detach().double().clone()
    if layer.rows.kind == "scale":
        return tensor.unsqueeze(1) / (layer.module.running_var.double().unsqueeze(1) + 1e-6).sqrt()
    if layer.rows.single:
        return tensor.reshape(1, -1)
    if isinstance(layer.module, nn.ConvTranspose2d):
        groups = layer.module.groups
        parts = tensor.chunk(groups)
        return torch.stack([part[:, out].flatten() for part in parts for out in range(part.shape[1])])
    return tensor.flatten(1)


def moved(layer, seed=1, by=0.1):
    with torch.no_grad():
        layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) * by)


def measured(ball):
    found = ball.distances(KERNEL)
    return found if ball.by_row else found.sum().sqrt()


def plain(norm, T):
    return T.abs().sum(1) if norm == "mars" else T.square().sum().sqrt()


@NORMS
@EVERY
def test_distances_are_those_of_the_definition_before_and_after_the_weight_has_another_form(kind, convention, norm):
    layer = layer_of(kind, convention)
    start = matrix(layer, layer.weight)
    ball = ball_of(layer, norm)
    assert not measured(ball).any()
    moved(layer)
    if kind == "scale":
        layer.module.running_var.mul_(3)
    norm = "mars" if ball.by_row else norm
    torch.testing.assert_close(measured(ball), plain(norm, matrix(layer, layer.weight) - start), rtol=1e-12, atol=0)
    layer.module.to(torch.float64)
    moved(layer, seed=2)
    torch.testing.assert_close(measured(ball), plain(norm, matrix(layer, layer.weight) - start), rtol=1e-12, atol=0)


@EVERY
def test_blocks_are_the_rows_of_the_weights_themselves(kind, convention):
    layer = layer_of(kind, convention)
    blocks = ball_of(layer).blocks()
    expected = matrix(layer, layer.weight)
    units = [torch.ones_like(block.radius) if block.unit is None else block.unit for block in blocks]
    found = torch.cat([b.weight.flatten(1) / unit.unsqueeze(1) for b, unit in zip(blocks, units, strict=True)])
    assert torch.equal(found.sort().values, expected.sort().values)
    for block, unit in zip(blocks, units, strict=True):
        assert block.weight.shape == block.centre.shape
        torch.testing.assert_close(block.radius, 0.5 * unit)
        block.weight.zero_()
    assert not layer.weight.any()


@NORMS
@pytest.mark.parametrize(("kind", "convention"), LAYERS)
@given(dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_ball_around_a_rounded_reference_lies_in_the_true_one(kind, convention, norm, dtype, seed):
    layer = layer_of(kind, convention, torch.float64)
    true = matrix(layer, layer.weight)
    ball = ball_of(layer, norm, stored=dtype)
    way = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)).double()
    ways = layer.rows.blocks(way) if norm == "mars" else [way]
    for block, to in zip(ball.blocks(), ways, strict=True):
        assert block.centre.dtype == dtype
        sizes = plain(norm, to.flatten(1)).expand(len(to))
        block.weight.copy_(block.centre.double() + to * (block.radius / sizes).view(-1, *[1] * (to.ndim - 1)))
    distance = plain(norm, matrix(layer, layer.weight) - true)
    assert bool((distance <= 0.5 + 1e-12).all())
    assert float(distance.max()) > 0.4
    expected = torch.full_like(distance, 0.5 if norm == "mars" else ball.room)
    torch.testing.assert_close(measured(ball), expected)


@NORMS
@EVERY
def test_the_norm_of_a_reference_is_that_of_the_definition_however_it_is_stored(kind, convention, norm):
    layer = layer_of(kind, convention)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    seen = Reference.view(layer.module, [layer])
    kept = seen.keep([layer])
    assert kept.stored(layer.name).dtype == torch.bfloat16
    T = matrix(layer, layer.weight)
    expected = plain("mars" if kind == "scale" else norm, T).max()
    assert reference_norm(layer, norm, seen) == reference_norm(layer, norm, kept) == pytest.approx(float(expected))


@NORMS
@EVERY
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite_is_refused(kind, convention, norm, value):
    layer = layer_of(kind, convention)
    with torch.no_grad():
        layer.weight[(-1,) * layer.weight.ndim] = value
    with pytest.raises(ConfigurationError, match="The reference of weight holds a NaN or an infinity"):
        reference_norm(layer, norm, Reference.view(layer.module, [layer]))


@NORMS
def test_how_far_rounding_moves_a_centre_is_nothing_where_the_dtype_holds_it(norm):
    layer = layer_of("transposed")
    W = layer.weight.detach()
    assert float(distance_between(layer, norm, W, torch.float64)) == 0
    assert float(distance_between(layer, norm, W.bfloat16(), torch.float32)) == 0
    assert not distance_between(layer, norm, W.bfloat16().float(), torch.bfloat16).any()
    found = distance_between(layer, norm, W, torch.float16)
    torch.testing.assert_close(found, plain(norm, matrix(layer, W) - matrix(layer, W.half())), rtol=1e-12, atol=0)


@NORMS
def test_a_radius_that_the_rounding_uses_up_is_refused_with_what_rounds(norm):
    with pytest.raises(ConfigurationError, match=r"^reference_dtype=torch\.bfloat16 moves the centre of weight"):
        ball_of(layer_of("linear"), norm, radius=1e-4, stored=torch.bfloat16)
    layer = layer_of("linear")
    reference = Reference.of(layer.module)
    layer.module.bfloat16()
    none = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ConfigurationError, match=r"^the weights' dtype=torch\.bfloat16 moves the centre of weight"):
        make_ball(layer, norm, 1e-4, 1.0, none, reference)
    assert make_ball(layer, norm, 0.5, 1.0, none, reference).shift is None


@NORMS
def test_the_size_is_not_below_that_of_a_reference_that_was_rounded_up(norm):
    layer = layer_of("linear")
    with torch.no_grad():
        layer.weight.fill_(1.0045)
    stored = matrix(layer, layer.weight.bfloat16())
    assert ball_of(layer, norm, stored=torch.bfloat16).size >= float(plain(norm, stored).max())


def test_the_centre_takes_the_order_that_the_weight_has_now():
    layer = layer_of("convolution")
    ball = ball_of(layer)
    for order in (torch.contiguous_format, torch.channels_last):
        layer.module.to(memory_format=order)
        (block,) = ball.blocks()
        assert block.centre.stride() == layer.weight.stride()
        assert torch.equal(block.centre, layer.weight)


@NORMS
@EVERY
def test_kernels_hold_on_to_what_stays_in_one_stretch(kind, convention, norm):
    layer = layer_of(kind, convention)
    ball = ball_of(layer, norm)
    found = ball.in_memory()
    if kind == "scale" or (kind == "transposed" and norm == "mars"):
        assert found is None
        return
    (stretches,) = found
    assert stretches.weight.data_ptr() == layer.weight.data_ptr()
    assert stretches.weight.shape == (
        matrix(layer, layer.weight).shape if norm == "mars" else (1, layer.weight.numel())
    )
    assert stretches.size == ball.size == pytest.approx(float(plain(norm, matrix(layer, layer.weight)).max()))


@NORMS
def test_a_head_has_its_ball_around_0_and_keeps_no_centre(norm):
    layer = layer_of("linear")
    ball = Ball(layer, norm, 0.5, None)
    torch.testing.assert_close(measured(ball), plain(norm, matrix(layer, layer.weight)))
    assert [stretches.centre for stretches in ball.in_memory()] == [None]
    assert all(block.centre.untyped_storage().nbytes() <= 4 for block in ball.blocks())


def test_each_number_that_is_known_of_a_row_is_counted_once():
    ball = ball_of(layer_of("linear"), stored=torch.bfloat16)
    (block,) = ball.blocks()
    kept = {t.data_ptr(): t.nbytes for t in (block.radius, block.shift, ball.shift)}
    assert ball.nbytes == sum(kept.values())
