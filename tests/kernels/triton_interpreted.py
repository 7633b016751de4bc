"""The promise, kept by the Triton kernels: test_triton.py runs it in a process where Triton interprets them."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from triton import language as tl
from triton.runtime import interpreter

from tethertune import projections
from tethertune.kernels import exact
from tethertune.kernels import triton as kernels
from tethertune.kernels.stretches import Stretches, as_stretches

spec = importlib.util.spec_from_file_location("test_chunked", Path(__file__).with_name("test_chunked.py"))
chunked = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chunked)
bits, l1, l2, adversarial, check_rows = (
    chunked.bits, chunked.l1, chunked.l2, chunked.adversarial, chunked.check_rows
)  # fmt: skip

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = {1: 16_000, 2: 10_000, 9: 16_000, 27: 8000, 64: 8000, 131: 2500, 576: 1200, 1024: 600, 2304: 200, 11_008: 40}


def patch_each_module_once(fn, patch=interpreter._patch_lang, patched=set()):  # noqa: B006 - kept between calls
    """The interpreter does it again at every call of every function, which takes more than half of the time."""
    if id(fn.__globals__) not in patched:
        patched.add(id(fn.__globals__))
        patch(fn)
    return interpreter._LangPatchScope()


interpreter._patch_lang = patch_each_module_once


def stretches(W, centre, radius, by_row=True):
    found = as_stretches(
        W, centre, torch.as_tensor(radius, dtype=torch.float64).reshape(-1), size=math.inf, by_row=by_row
    )
    assert kernels.supports(found, by_row=by_row)
    return found


def mars(W, centre, radius):
    broken = torch.zeros(1, dtype=torch.int64)
    kernels.mars(kernels.mars_table([stretches(W, centre, radius)]), broken)
    return int(broken)


def frobenius(W, centre, radius):
    broken = torch.zeros(1, dtype=torch.int64)
    kernels.frobenius(kernels.frobenius_table([stretches(W, centre, radius, by_row=False)]), broken)
    return int(broken)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_sixty_thousand_adversarial_rows(dtype, monkeypatch):
    """With more rows a program than on a device, which the interpreter does nearly as fast as one."""
    for name, rows in (("ROWS_NARROW", 2048), ("ROWS_MEDIUM", 512), ("ROWS_WIDE", 128)):
        monkeypatch.setattr(kernels, name, tl.constexpr(rows))
    generator = torch.Generator().manual_seed(21)
    counted = outside = 0
    for columns, rows in COLUMNS.items():
        W, centre, radius = adversarial(rows, columns, dtype, generator)
        outside += int((l1(W, centre) > radius).sum())
        check_rows(mars, W, centre, radius)
        counted += rows
    assert counted > 60_000
    assert outside > 20_000


def network(dtypes, generator):
    """Layers of every shape a program has, in a table of their own or all in one; weights, centres and radii."""
    layers = []
    for weight, centre in dtypes:
        for shape in ((7, 1), (19, 9), (5, 64), (3, 131), (3, 264), (2, 1024), (2, 2053)):
            columns = shape[1]
            c = (torch.randn(shape, generator=generator) * columns**-0.5).to(centre)
            W = (c.float() + torch.randn(shape, generator=generator) * columns**-0.5 / 4).to(weight)
            radius = l1(W, c) * torch.tensor([0.3, 0.9, 1.0, 1.1])[torch.randint(4, shape[:1], generator=generator)]
            layers.append((W, c, radius.clamp(min=0.01)))
    return layers


PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def test_one_table_for_all_layers_against_the_definition():
    layers = network(PAIRS, torch.Generator().manual_seed(22))
    before = [W.clone() for W, _, _ in layers]
    table = kernels.mars_table([stretches(*layer) for layer in layers])
    assert len(table.jobs) == len(PAIRS)
    broken = torch.zeros(1, dtype=torch.int64)
    kernels.mars(table, broken)
    once = [W.clone() for W, _, _ in layers]
    for (W, c, radius), old in zip(layers, before, strict=True):
        assert (l1(W, c) <= radius).all()
        inside = l1(old, c) <= radius
        assert torch.equal(bits(W[inside]), bits(old[inside]))
        expected = c.double() + projections.l1_rows(old.double() - c.double(), radius)
        unit = torch.maximum(expected.abs(), c.double().abs()).clamp(min=1e-2) * torch.finfo(W.dtype).eps
        assert ((W.double() - expected).abs() <= 1.5 * unit + 2.0**-14 * (expected - c.double()).abs()).all()
    kernels.mars(table, broken)
    assert all(torch.equal(bits(W), bits(old)) for (W, _, _), old in zip(layers, once, strict=True))
    assert broken.item() == 0
    for _, _, radius in layers:  # a schedule: the table stays
        radius.mul_(0.5)
    kernels.mars(table, broken)
    assert all((l1(W, c) <= radius).all() for W, c, radius in layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [9, 300])
def test_rows_that_are_not_finite_are_left_and_counted(dtype, columns):
    W = torch.ones(6, columns, dtype=dtype)
    W[1, 2], W[2, 0], W[3, -1] = math.nan, math.inf, -math.inf
    before, centre = W.clone(), torch.zeros((), dtype=dtype).expand(W.shape)
    assert mars(W, centre, torch.ones(6)) == 3
    assert torch.equal(bits(W[1:4]), bits(before[1:4]))
    assert (l1(W[[0, 4, 5]], centre[[0, 4, 5]]) <= 1).all()
    assert frobenius(W, centre, torch.ones(1)) == 1
    assert torch.equal(bits(W[1:4]), bits(before[1:4]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_radius_is_the_centre_also_between_infinite_ones(dtype):
    generator = torch.Generator().manual_seed(23)
    centre = torch.randn(10, 40, generator=generator).to(dtype)
    W = centre + torch.randn(10, 40, generator=generator).to(dtype)
    before = W.clone()
    check_rows(mars, W, centre, torch.tensor([0.0, math.inf]).double().repeat(5))
    assert torch.equal(W[::2], centre[::2])
    assert torch.equal(W[1::2], before[1::2])
    W = before.clone()
    frobenius(W, centre, torch.zeros(1))
    assert torch.equal(W, centre)


def test_the_largest_numbers_do_not_overflow():
    W = torch.full((3, 500), 3e38)
    check_rows(mars, W, torch.full((3, 500), -3e38), torch.full((3,), 1e4).double())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(shape):
    W, broken = torch.ones(shape), torch.zeros(1, dtype=torch.int64)
    empty = Stretches(W, None, torch.zeros(shape[0]).double())
    full = torch.ones(2, 3)
    kernels.mars(kernels.mars_table([empty, stretches(full, torch.zeros(2, 3), torch.ones(2))]), broken)
    assert (l1(full, torch.zeros(2, 3)) <= 1).all()
    kernels.mars(kernels.mars_table([empty]), broken)
    kernels.frobenius(kernels.frobenius_table([empty]), broken)
    assert broken.item() == 0


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_rows_are_settled_as_the_definition_does_it_also_over_several_tiles(dtype):
    """The weights of the first tile are small, so that their steps are not enough."""
    generator = torch.Generator().manual_seed(30)
    size = torch.where(torch.arange(2600) < 512, 1 / 64, 1.0)
    centre = (torch.randn(6, 2600, generator=generator) * size).to(dtype)
    W = centre + (torch.randn(6, 2600, generator=generator) / 50 * size).to(dtype)
    radius = l1(W, centre) * torch.tensor([0.2, 0.5, 0.8, 0.9, 0.99, 0.999])
    expected, _ = exact.rows(W.clone(), centre, radius, projections.l1_rows)
    mars(W, centre, radius)
    assert (bits(W) != bits(expected)).sum() <= 2  # float32 lies between on the way to 16 bits


LAYOUTS = {
    "channels last": lambda W: W.contiguous(memory_format=torch.channels_last),
    "gaps between rows": lambda W: torch.cat([W, W], dim=1)[:, : W.shape[1]],
    "not aligned": lambda W: torch.cat([W.flatten()[:1], W.flatten()])[1:].view(W.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_layouts_of_weights_and_reference(dtype, layout):
    generator = torch.Generator().manual_seed(24)
    for channels in (3, 40):
        centre = LAYOUTS[layout](torch.randn(5, channels, 3, 3, generator=generator).to(dtype))
        W = LAYOUTS[layout](centre + torch.randn(centre.shape, generator=generator).to(dtype) * 0.01)
        strides = W.stride()
        check_rows(mars, W, centre, l1(W, centre) * torch.linspace(0.7, 1.2, 5))
        assert W.stride() == strides


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_float32_reference_under_16_bit_weights_down_to_what_rounding_leaves(dtype):
    generator = torch.Generator().manual_seed(25)
    for columns in (24, 1100):
        centre = torch.randn(6, columns, generator=generator) / 8
        least = l1(centre.to(dtype), centre)
        for room in (1.0 + 1e-9, 1.1, 3.0):
            T = torch.randn(6, columns, generator=generator) * (torch.rand(6, columns, generator=generator) < 0.3)
            W = (centre + T * least.unsqueeze(1).float() * 0.05).to(dtype)
            check_rows(mars, W, centre, least * room)
            W = (centre + T * least.unsqueeze(1).float() * 0.05).to(dtype)
            check_layer(W, centre, float(l2(centre.to(dtype), centre)) * room)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_row_longer_than_what_float32_may_add_up(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "FLUSH", tl.constexpr(2))
    generator = torch.Generator().manual_seed(26)
    for share in (0.5, 1.0, 1 - 1e-6):
        centre = torch.randn(1, 5000, generator=generator).to(dtype)
        W = centre + torch.randn(1, 5000, generator=generator).to(dtype)
        check_rows(mars, W, centre, l1(W, centre) * share)


# --------------------------------------------------------------------------------------------------- Frobenius ball


def check_layer(W, centre, radius):
    before, start = W.clone(), l2(W, centre)
    assert frobenius(W, centre, radius) == 0
    after = l2(W, centre)
    assert after <= radius
    if start <= radius:
        assert torch.equal(bits(W), bits(before)), "a layer inside was changed"
    once = W.clone()
    frobenius(W, centre, radius)
    assert torch.equal(bits(W), bits(once)), "a second application changed something"


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_adversarial_layers(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 1024)
    generator = torch.Generator().manual_seed(27)
    outside = 0
    for columns, count in ((1, 10), (64, 60), (2304, 20), (3333, 10)):
        W, centre, radius = adversarial(count, columns, dtype, generator)
        for w, c, r in zip(W, centre, radius.tolist(), strict=True):
            outside += bool(l2(w, c) > r)
            check_layer(w.view(1, -1), c.view(1, -1), r)
    assert outside > 20


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_layers_whose_chunks_differ_and_whose_squares_float32_cannot_hold(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 1024)
    for scale in (1.0, 1e-19, 1e-23, 1e-37):
        centre = torch.zeros(3, 1024, dtype=dtype)
        W = (torch.randn(3, 1024, generator=torch.Generator().manual_seed(28)) * scale).to(dtype)
        W[1] *= 1e-3
        for radius in (float(l2(W, centre)) * 0.3, float(l2(W, centre)) * (1 - 1e-9), 0.0):
            check_layer(W.clone(), centre, radius)


def test_one_table_of_layers_and_their_parts_on_two_ranks_are_the_same():
    """What is added up over ranks is what a rank would have found alone."""
    generator = torch.Generator().manual_seed(29)
    whole = [
        (W, c, l2(W, c) * share)
        for (W, c, _), share in zip(network(PAIRS[:3], generator), [0.5, 0.9, 1.1] * 7, strict=True)
    ]
    parts = [[(W[half].clone(), c[half], radius) for W, c, radius in whole] for half in (slice(2), slice(2, None))]
    before = [W.clone() for W, _, _ in whole]
    broken = torch.zeros(1, dtype=torch.int64)
    kernels.frobenius(kernels.frobenius_table([stretches(*layer, by_row=False) for layer in whole]), broken)
    tables = [
        kernels.frobenius_table([Stretches(W, c, radius.reshape(1)) for W, c, radius in layers]) for layers in parts
    ]
    totals = sum(kernels.squares(table).sum(dim=1) for table in tables)
    for table in tables:
        kernels.scale(table, totals.unsqueeze(1), broken)
    for (W, c, radius), old, first, second in zip(whole, before, *parts, strict=True):
        joined = torch.cat([first[0], second[0]])
        assert l2(W, c) <= radius
        assert l2(joined, c) <= radius
        if l2(old, c) <= radius:
            assert torch.equal(bits(W), bits(old))
            assert torch.equal(bits(joined), bits(old))
        expected = c.double() + projections.frobenius(old.double() - c.double(), radius)
        for found in (W, joined):
            error = float(l2(found, expected))
            assert error <= 2.0**-13 * radius + torch.finfo(W.dtype).eps * float(expected.norm())
    assert broken.item() == 0
