"""What is particular to the C kernels: every stored number, addresses, many blocks at once, threads, radii."""

import pytest
import torch

from tethertune import norms
from tethertune.kernels import native
from tethertune.kernels.stretches import Stretches

SIXTEEN = [torch.bfloat16, torch.float16]


def block(W, centre, radius):
    return Stretches(W, centre, torch.as_tensor(radius, dtype=torch.float64).expand(len(W)).contiguous())


def project(*blocks, norm="mars", projection="radial"):
    table = native.Table(blocks, norm, projection)
    return table.project(), [b.outside for b in table.blocks]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_16_bit_number_is_read_as_it_is_and_stepped_over(dtype):
    """At its radius a weight stays; a little below, it becomes the next number towards 0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite() & (every != 0)]
    W = finite.clone().unsqueeze(1)
    radius = finite.double().abs()
    assert project(block(W, None, radius)) == (0, [0])
    assert torch.equal(W.squeeze(1), finite)
    assert project(block(W, None, radius * (1 - 1e-9))) == (0, [len(finite)])
    assert torch.equal(W.squeeze(1), (finite.view(torch.int16) - 1).view(dtype))
    assert project(block(every[~every.isfinite()].unsqueeze(1), None, 1.0))[0] == int((~every.isfinite()).sum())


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_weights_are_rounded_to_nearest(dtype):
    W = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    W[:, 1:] = 0
    start = W.clone()
    project(block(W, None, W.double().abs().sum(1) * 0.7))
    assert ((W.double() - start.double() * 0.7).abs() <= start.double().abs() * 0.7 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 16, 61])
def test_a_reference_at_any_address(columns, dtype, offset):
    """A mapped safetensors file may begin its tensors at any byte."""
    generator = torch.Generator().manual_seed(1)
    aligned = torch.randn(50, columns, generator=generator).to(dtype)
    memory = bytearray(offset) + bytearray(aligned.view(torch.uint8).numpy().tobytes())
    centre = torch.frombuffer(memory, dtype=dtype, offset=offset).view(50, columns)
    assert centre.data_ptr() % dtype.itemsize == offset % dtype.itemsize
    W = aligned.float() + torch.randn(50, columns, generator=generator)
    expected = W.clone()
    assert project(block(W, centre, 0.3)) == project(block(expected, aligned, 0.3))
    assert torch.equal(W, expected)


def blocks_of_all_kinds():
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 1), (3000, 9), (64, 27), (700, 1000), (1, 300_000), (2, 5), (1000, 513), (0, 4), (5, 0)]
    found = []
    for number, shape in enumerate(shapes):
        dtype = (torch.float32, *SIXTEEN)[number % 3]
        centre = None if number % 4 == 3 else (torch.randn(shape, generator=generator) / 10).to(dtype)
        W = torch.randn(shape, generator=generator).to(dtype) * 0.01
        W = W if centre is None else (centre.float() + W.float()).to(dtype)
        radius = norms.row_sums(W.double() - (0.0 if centre is None else centre.double()))
        found.append(block(W, centre, radius * torch.linspace(0.5, 1.5, len(W)).double()))
    return found


@pytest.mark.parametrize(("norm", "projection"), [("mars", "radial"), ("mars", "euclidean"), ("frobenius", "radial")])
def test_many_blocks_on_any_number_of_threads_have_the_same_bits_as_each_alone(norm, projection):
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            blocks = [b._replace(radius=b.radius / 100) if norm == "frobenius" else b for b in blocks_of_all_kinds()]
            blocks = [b for b in blocks if len(b.radius)]
            if threads == 7:
                outside = [project(b, norm=norm, projection=projection)[1][0] for b in blocks]
            else:
                outside = project(*blocks, norm=norm, projection=projection)[1]
            results.append((outside, [b.weight for b in blocks]))
        finally:
            torch.set_num_threads(1)
    (counts, weights), *others = results
    assert sum(counts) > (5 if norm == "frobenius" else 2000)
    for other_counts, other_weights in others:
        assert other_counts == counts
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_a_radius_changed_in_place_counts_from_the_next_call():
    W, radius = torch.ones(3, 8), torch.full((3,), 10.0, dtype=torch.float64)
    table = native.Table([Stretches(W, None, radius)], "mars")
    table.project()
    assert (W == 1).all()
    radius.copy_(torch.tensor([1.0, 20.0, 2.0]))
    table.project()
    assert W.sum(1).tolist() == pytest.approx([1.0, 8.0, 2.0], rel=1e-4)


def test_what_it_takes():
    radius = torch.ones(4, dtype=torch.float64)
    W = torch.ones(4, 3)
    assert native.supports(Stretches(W, W.bfloat16(), radius))
    assert not native.supports(Stretches(W.double(), W, radius))
    assert not native.supports(Stretches(W, W.double(), radius))
    assert not native.supports(Stretches(W, W.to("meta"), radius))
