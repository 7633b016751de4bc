"""The promise, row by row: zero violations in float64 from the stored weights, and what is inside keeps its bits."""

import math

import pytest
import torch

from tethertune import norms, projections
from tethertune.kernels import chunked, exact, native
from tethertune.kernels.chunked import Chunked
from tethertune.kernels.stretches import Stretches, as_stretches

torch.set_num_threads(1)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DEFINITIONS = {"radial": projections.l1_rows, "euclidean": projections.l1_rows_euclidean}
COLUMNS = {1: 20_000, 2: 20_000, 9: 20_000, 64: 10_000, 131: 4_000, 576: 2_000, 2304: 500, 11_008: 200}


class Native:
    """The C kernels with the methods of ``Chunked``: a table of one block, made for the call."""

    def __init__(self, projection="radial"):
        self.projection = projection

    def rows(self, W, centre, radius, *, size=math.inf):
        return self.project(as_stretches(W, centre, radius, size=size, by_row=True), "mars")

    def frobenius(self, parts, radius, *, size=math.inf):
        ((W, centre),) = parts
        return self.project(
            as_stretches(W, centre, torch.tensor([radius], dtype=torch.float64), size=size, by_row=False), "frobenius"
        )

    def project(self, rows, norm):
        assert native.supports(rows)
        table = native.Table([rows], norm, self.projection)
        broken = table.project()
        assert broken == table.blocks[0].broken
        return broken


KERNELS = {"chunked": Chunked, "native": Native}


def every(*dtypes):
    """Each kernel with each of the dtypes that it takes."""
    cases = [(kernel, dtype) for kernel in KERNELS for dtype in dtypes if (kernel, dtype) != ("native", torch.float64)]
    return pytest.mark.parametrize(("kernel", "dtype"), cases)


def bits(W):
    return W.contiguous().view(INTEGERS[W.element_size()])


def l1(W, centre):
    return norms.row_sums(W.reshape(len(W), -1).double() - centre.reshape(len(W), -1).double())


def l2(W, centre):
    return norms.frobenius(W.double() - centre.double())


def adversarial(rows, columns, dtype, generator):
    """Weights, centres and radii of rows, each of its own kind, so that a chunk holds all kinds at once.

    Radii are 1e-6 to 1e4. Centres are 0, subnormal, small, like a network's, and large. Displacements are dense, of one
    entry, or over twelve orders of magnitude; they end inside, at the radius to a float32 rounding, a little
    outside, and up to a million times outside.
    """

    def pick(values):
        return torch.tensor(values)[torch.randint(len(values), (rows, 1), generator=generator)].double()

    def normal():
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    radius = pick([1e-6, 1e-3, 0.3, 1.0, 30.0, 1e4])
    centre = (normal() * pick([0.0, 1e-40, 1e-7, 1e-3, columns**-0.5, columns**-0.5, 1.0, 300.0])).to(dtype)
    shape = pick([0.0, 0.0, 1.0, 2.0])
    one_entry = torch.zeros(rows, columns).double()
    one_entry[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] = 1
    spread = normal() * 10 ** (12 * torch.rand(rows, columns, generator=generator).double() - 6)
    T = torch.where(shape == 0, normal(), torch.where(shape == 1, one_entry, spread))
    T = T * (torch.rand(rows, columns, generator=generator) < pick([1.0, 1.0, 0.5]))
    size = T.abs().sum(1, keepdim=True)
    share = pick([0.0, 0.5, 1 - 1e-5, 1 - 1e-7, 1.0, 1.0, 1 + 1e-7, 1 + 1e-5, 1.05, 2.0, 1e3, 1e6])
    T = T / size.clamp(min=1e-300) * radius * share
    W = (centre.double() + T).to(dtype)
    return torch.where(W.isfinite(), W, centre), centre, radius.squeeze(1)


def check_rows(project, W, centre, radius, distance=l1):
    """Project and check; returns the distances after."""
    before, start = W.clone(), distance(W, centre)
    project(W, centre, radius)
    after = distance(W, centre)
    finite = start.isfinite()
    assert not (after > radius)[finite].any(), f"{int((after > radius)[finite].sum())} rows outside"
    untouched = (start <= radius) | ~finite
    assert torch.equal(bits(W[untouched]), bits(before[untouched])), "a row inside was changed"
    once = W.clone()
    project(W, centre, radius)
    assert torch.equal(bits(W), bits(once)), "a second application changed something"
    return after


@pytest.mark.parametrize("projection", DEFINITIONS)
@every(*DTYPES)
def test_more_than_fifty_thousand_adversarial_rows(dtype, projection, kernel):
    generator = torch.Generator().manual_seed(1)
    kernel = KERNELS[kernel](projection)
    counted = outside = 0
    for columns, rows in COLUMNS.items():
        W, centre, radius = adversarial(rows, columns, dtype, generator)
        outside += int((l1(W, centre) > radius).sum())
        check_rows(kernel.rows, W, centre, radius)
        counted += rows
    assert counted > 50_000
    assert outside > 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_not_measured_again_because_the_norm_of_the_centre_is_known(dtype, monkeypatch):
    """Radii below, about and above the least that needs no second look."""
    generator = torch.Generator().manual_seed(17)
    kernel, skipped, counted = Chunked(), 0, 0
    measure = Chunked._row_sums
    calls = []
    monkeypatch.setattr(Chunked, "_row_sums", lambda *args: calls.append(1) or measure(*args))
    for columns, rows in ((1, 2000), (9, 1000), (131, 400), (576, 200), (11_008, 20)):
        for scale in (0.0, 1e-38, 1e-3, columns**-0.5, 300.0):
            centre = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale).to(dtype)
            size = float(norms.mars(centre))
            least = (chunked._SINGLE if dtype == torch.float32 else chunked._DOUBLE).least_radius(size)
            for radius in (1e-6, 0.3, 1e4, least * 0.99, least, least * 1.01, least * 10):
                for excess in (1 + 1e-4, 1.5, 1e3, 1e13, 1e16):
                    T = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
                    W = (centre.double() + T / norms.row_sums(T).unsqueeze(1) * radius * excess).to(dtype)
                    calls.clear()

                    def project(W, centre, radius, size=size):
                        kernel.rows(W, centre, radius, size=size)

                    check_rows(project, W, centre, torch.full((rows,), radius, dtype=torch.float64))
                    skipped += len(calls) == 2  # one measure a call, the second call included
                    counted += 1
    assert 0.2 * counted < skipped < 0.95 * counted


@pytest.mark.parametrize("projection", DEFINITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_of_an_accelerator_on_the_same_rows(dtype, projection):
    generator = torch.Generator().manual_seed(2)

    def masked(W, centre, radius):
        W.copy_(exact.rows(W, centre, radius, DEFINITIONS[projection])[0])

    for columns, rows in COLUMNS.items():
        W, centre, radius = adversarial(rows // 2, columns, dtype, generator)
        check_rows(masked, W, centre, radius)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("projection", DEFINITIONS)
@pytest.mark.parametrize("columns", [9, 27, 576, 1152, 2304, 4608, 11_008])
def test_float32_rows_like_a_networks_lose_at_most_a_ten_thousandth_of_the_radius(columns, projection, kernel):
    generator = torch.Generator().manual_seed(3)
    rows = max(20, 100_000 // columns)
    centre = torch.randn(rows, columns, generator=generator) * columns**-0.5
    for radius, excess in ((1.0, 1.05), (1.0, 30.0), (0.1, 1.001)):
        T = torch.randn(rows, columns, generator=generator)
        T *= radius * excess / T.abs().sum(1, keepdim=True)
        W = centre + T
        displacement = W.double() - centre.double()
        project = KERNELS[kernel](projection).rows
        after = check_rows(project, W, centre, torch.full((rows,), radius, dtype=torch.float64))
        assert (after >= radius * (1 - 1e-4)).all()
        expected = DEFINITIONS[projection](displacement, radius)
        assert (l1(W.double() - centre.double(), expected) <= 1e-4 * radius).all()


@pytest.mark.parametrize("projection", DEFINITIONS)
@every(torch.float16, torch.bfloat16)
def test_16_bit_rows_are_within_a_rounding_and_a_step_of_the_definition(dtype, projection, kernel):
    generator = torch.Generator().manual_seed(4)
    centre = (torch.randn(500, 64, generator=generator) / 8).to(dtype)
    W = centre + (torch.randn(500, 64, generator=generator) / 20).to(dtype)
    expected = centre.double() + DEFINITIONS[projection](W.double() - centre.double(), 1.0)
    after = check_rows(KERNELS[kernel](projection).rows, W, centre, torch.ones(500).double())
    assert after.median() > 1 - 4 * torch.finfo(dtype).eps
    largest = torch.maximum(expected.abs(), centre.double().abs()).clamp(min=1e-3)
    assert ((W.double() - expected).abs() <= 1.5 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("projection", DEFINITIONS)
@every(torch.float16, torch.bfloat16)
def test_a_float32_reference_under_16_bit_weights_down_to_what_rounding_leaves(dtype, projection, kernel):
    """Its numbers lie between the stored ones, so the ball may hold little more than the nearest of them."""
    generator = torch.Generator().manual_seed(5)
    centre = torch.randn(3000, 64, generator=generator) / 8
    least = l1(centre.to(dtype), centre)
    for room in (1.0 + 1e-9, 1.001, 1.1, 1.5, 3.0):
        moved = torch.rand(3000, 64, generator=generator) < 0.3
        T = torch.randn(3000, 64, generator=generator) * moved * least.unsqueeze(1).float() * 0.05
        W = (centre + T).to(dtype)
        outside = l1(W, centre) > least * room
        assert outside.any() or room == 3.0
        check_rows(KERNELS[kernel](projection).rows, W, centre, least * room)


@pytest.mark.parametrize("projection", DEFINITIONS)
@every(torch.float32, torch.float64)
def test_a_16_bit_or_wider_reference(dtype, projection, kernel):
    for centre_dtype in (torch.bfloat16, torch.float16) + (torch.float64,) * (kernel == "chunked"):
        generator = torch.Generator().manual_seed(6)
        centre = (torch.randn(2000, 27, generator=generator, dtype=torch.float64) / 5).to(centre_dtype)
        W = (centre.double() + torch.randn(2000, 27, generator=generator) * 0.1).to(dtype)
        after = check_rows(KERNELS[kernel](projection).rows, W, centre, torch.ones(2000).double())
        assert ((after <= 1) & (after >= 1 - 1e-4)).any()


@every(*DTYPES)
def test_a_zero_radius_is_the_centre_also_between_infinite_ones(dtype, kernel):
    generator = torch.Generator().manual_seed(7)
    centre = torch.randn(64, 40, generator=generator).to(dtype)
    W = centre + torch.randn(64, 40, generator=generator).to(dtype)
    before = W.clone()
    radius = torch.tensor([0.0, math.inf], dtype=torch.float64).repeat(32)
    check_rows(KERNELS[kernel]().rows, W, centre, radius)
    assert torch.equal(W[::2], centre[::2])
    assert torch.equal(W[1::2], before[1::2])


@pytest.mark.parametrize("kernel", KERNELS)
def test_negative_zeros_inside_keep_their_sign(kernel):
    W = torch.full((4, 3), -0.0)
    KERNELS[kernel]().rows(W, torch.zeros(4, 3), torch.zeros(4).double())
    assert W.signbit().all()


@every(*DTYPES)
@pytest.mark.parametrize("projection", DEFINITIONS)
def test_rows_that_are_not_finite_are_left_and_counted(dtype, projection, kernel):
    W = torch.ones(5, 4, dtype=dtype)
    W[1, 2], W[2, 0], W[3, 3] = math.nan, math.inf, -math.inf
    before = W.clone()
    centre = torch.zeros((), dtype=dtype).expand(W.shape)
    assert KERNELS[kernel](projection).rows(W, centre, torch.ones(5).double()) == 3
    assert torch.equal(bits(W[1:4]), bits(before[1:4]))
    assert (l1(W[[0, 4]], centre[[0, 4]]) <= 1).all()


@pytest.mark.parametrize("projection", DEFINITIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_numbers_do_not_overflow(kernel, projection):
    W = torch.full((3, 500), 3e38)
    check_rows(KERNELS[kernel](projection).rows, W, torch.full((3, 500), -3e38), torch.full((3,), 1e4).double())


LAYOUTS = {
    "contiguous": lambda W: W.contiguous(),
    "channels last": lambda W: W.contiguous(memory_format=torch.channels_last),
    "rows second in memory": lambda W: W.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda W: W.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "gaps in rows": lambda W: torch.cat([W, W], dim=3)[..., :5],
    "gaps between rows": lambda W: torch.cat([W, W], dim=1)[:, : W.shape[1]],
}


@pytest.mark.parametrize(
    ("kernel", "layout", "same"),
    [("chunked", layout, same) for layout in LAYOUTS for same in (True, False)]
    + [("native", "contiguous", True), ("native", "channels last", True), ("native", "gaps between rows", False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_of_weights_and_reference(dtype, same, layout, kernel):
    generator = torch.Generator().manual_seed(8)
    centre = torch.randn(40, 6, 3, 5, generator=generator).to(dtype)
    W = LAYOUTS[layout](centre + torch.randn(40, 6, 3, 5, generator=generator).to(dtype) * 0.01)
    radius = torch.linspace(0.1, 1.4, 40, dtype=torch.float64)
    stride = W.stride()
    kernel = KERNELS[kernel]()
    centre = LAYOUTS[layout](centre) if same else centre
    check_rows(kernel.rows, W, centre, radius)
    assert W.stride() == stride
    check_rows(kernel.rows, W[1:-1:2], centre[1:-1:2], radius[1:-1:2] / 2)
    layer = LAYOUTS[layout](W.clone())
    assert kernel.frobenius([(layer, centre)], 0.1) == 0
    assert 0.1 * (1 - (1e-4 if dtype == torch.float32 else 0.2)) < l2(layer, centre) <= 0.1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 4, 3, 3), (4, 0, 3, 3)])
def test_nothing_to_do(shape):
    W, kernel = torch.ones(shape), Chunked()
    radius = torch.zeros(shape[0], dtype=torch.float64)
    assert kernel.rows(W, W, radius) == 0
    assert kernel.frobenius([(W, W)], 0.0) == 0
    assert kernel.distances(W, W).tolist() == [0.0] * shape[0]
    assert kernel.squares([(W, W)], exactly=True).shape == (0,)
    kernel.scale([(W, W)], 1.0, kernel.shares([(W, W)]), torch.zeros(2).double())


@every(*DTYPES)
def test_a_head_around_an_expanded_zero(dtype, kernel):
    W = torch.randn(30, 100, generator=torch.Generator().manual_seed(9)).to(dtype)
    centre = torch.zeros((), dtype=dtype).expand(W.shape)
    for projection in DEFINITIONS:
        after = check_rows(KERNELS[kernel](projection).rows, W.clone(), centre, torch.full((30,), 3.0).double())
        assert (after > 2.9).all()
    KERNELS[kernel]().frobenius([(W, centre)], 2.0)
    assert 1.98 < l2(W, centre) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_are_the_definition_in_float64(dtype):
    W, centre, _ = adversarial(2000, 131, dtype, torch.Generator().manual_seed(10))
    kernel = Chunked()
    torch.testing.assert_close(kernel.distances(W, centre), l1(W, centre), rtol=1e-13, atol=0)
    total = kernel.squares([(W, centre)], exactly=True).sum().sqrt()
    assert total.item() == pytest.approx(l2(W, centre).item(), rel=1e-13)


# --------------------------------------------------------------------------------------------------- Frobenius ball


def device_frobenius(kernel, parts, radius):
    """What the constraint does where the host may not look."""
    shares = kernel.shares(parts)
    kernel.scale(parts, radius, shares, shares.sum(dim=0))


def sized_frobenius(kernel, parts, radius):
    """What the constraint does on a CPU, where it knows the norm of the centre."""
    kernel.frobenius(parts, radius, size=math.sqrt(sum(float(norms.frobenius(centre)) ** 2 for _, centre in parts)))


def native_pieces(_, parts, radius):
    """The C kernels with every row as a piece that has a sum and a share of its own, as if the layer were long."""
    ((W, centre),) = parts
    flat = (t.view(len(W), -1) for t in (W, centre.contiguous()))
    Native().project(Stretches(*flat, torch.tensor([radius], dtype=torch.float64)), "frobenius")


FROBENIUS = {
    "cpu": lambda kernel, parts, radius: kernel.frobenius(parts, radius),
    "cpu, norm of the centre known": sized_frobenius,
    "accelerator": device_frobenius,
    "native": lambda _, parts, radius: Native().frobenius(parts, radius),
    "native, norm of the centre known": lambda _, parts, radius: sized_frobenius(Native(), parts, radius),
    "native, in pieces": native_pieces,
}
LAYER_DTYPES = [(way, dtype) for way in FROBENIUS for dtype in DTYPES if "native" not in way or dtype != torch.float64]


def check_layer(project, W, centre, radius):
    before, start = W.clone(), l2(W, centre)
    project(Chunked(), [(W, centre)], radius)
    after = l2(W, centre)
    assert after <= radius
    if start <= radius:
        assert torch.equal(bits(W), bits(before)), "a layer inside was changed"
    once = W.clone()
    project(Chunked(), [(W, centre)], radius)
    assert torch.equal(bits(W), bits(once)), "a second application changed something"
    return float(after)


@pytest.mark.parametrize(("way", "dtype"), LAYER_DTYPES)
def test_adversarial_layers(dtype, way, monkeypatch):
    """Single rows of the adversarial kinds as layers of their own, cut into several chunks."""
    monkeypatch.setattr(chunked, "_CPU_CHUNK", 50)
    generator = torch.Generator().manual_seed(11)
    outside = 0
    for columns, shape, count in ((1, (1, 1), 100), (64, (16, 4), 300), (576, (64, 9), 200), (11_008, (8, 1376), 20)):
        W, centre, radius = adversarial(count, columns, dtype, generator)
        W, centre = W.view(count, *shape), centre.view(count, *shape)
        for w, c, r in zip(W, centre, radius.tolist(), strict=True):
            outside += bool(l2(w, c) > r)
            check_layer(FROBENIUS[way], w, c, r)
    assert outside > 100


@pytest.mark.parametrize("way", FROBENIUS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_layer_of_more_than_four_million_weights(dtype, way):
    generator = torch.Generator().manual_seed(12)
    centre = (torch.randn(2100, 2048, generator=generator) / 45).to(dtype)
    W = centre + (torch.randn(2100, 2048, generator=generator) * 1e-3).to(dtype)
    expected = centre.double() + projections.frobenius(W.double() - centre.double(), 1.0)
    after = check_layer(FROBENIUS[way], W, centre, 1.0)
    assert after > 1 - (1e-4 if dtype == torch.float32 else 2e-2)
    largest = torch.maximum(expected.abs(), centre.double().abs()).clamp(min=1e-3)
    error = 1e-4 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
    assert ((W.double() - expected).abs() <= error * largest).all()


@pytest.mark.parametrize("way", FROBENIUS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("moved", [1.0, 0.01])
def test_a_layer_around_a_float32_reference_down_to_what_rounding_leaves(moved, dtype, way, monkeypatch):
    monkeypatch.setattr(chunked, "_CPU_CHUNK", 5000)
    generator = torch.Generator().manual_seed(13)
    centre = torch.randn(300, 100, generator=generator) / 8
    least = float(l2(centre.to(dtype), centre))
    size = least / 100 / math.sqrt(moved)
    T = torch.randn(300, 100, generator=generator) * (torch.rand(300, 100, generator=generator) < moved) * size
    T[:50] = 0  # chunks that cannot come nearer
    for room in (1 + 1e-9, 1.0001, 1.01, 1.1):
        check_layer(FROBENIUS[way], (centre + T).to(dtype), centre, least * room)


@pytest.mark.parametrize("way", FROBENIUS)
def test_chunks_of_very_different_sizes(way, monkeypatch):
    """Most of the distance in one chunk, distances in the others whose squares float32 cannot hold."""
    monkeypatch.setattr(chunked, "_CPU_CHUNK", 64)
    for scale in (1e-19, 1e-23, 1e-30, 1e-44):
        centre = torch.zeros(8, 64)
        W = torch.randn(8, 64, generator=torch.Generator().manual_seed(14)) * scale
        W[3] = 1.0
        for radius in (4.0, 1e-6, scale * 30):
            check_layer(FROBENIUS[way], W.clone(), centre, radius)


@pytest.mark.parametrize("way", FROBENIUS)
def test_distances_whose_squares_float32_cannot_hold(way):
    for scale in (1e-18, 1e-20, 1e-22, 3e-23, 1e-24, 1e-40):
        W = torch.randn(64, 64, generator=torch.Generator().manual_seed(18)) * scale
        for share in (0.1, 0.5, 0.9):
            check_layer(
                FROBENIUS[way], W.clone(), torch.zeros(()).expand(64, 64), float(l2(W, torch.zeros(()))) * share
            )


@pytest.mark.parametrize("way", FROBENIUS)
def test_radii_below_the_rounding_of_the_weights(way):
    generator = torch.Generator().manual_seed(15)
    for weight in (1.0, 1e-16, 1e-30):
        centre = torch.randn(64, 64, generator=generator) * weight
        W = centre + torch.randn(64, 64, generator=generator) * weight
        for radius in (weight * 1e-5, weight * 1e-7, weight * 1e-9, 0.0):
            check_layer(FROBENIUS[way], W.clone(), centre, radius)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_that_is_not_finite_is_left_and_counted(value):
    W = torch.ones(5, 4)
    W[1, 2] = value
    before, centre = W.clone(), torch.zeros(5, 4)
    for kernel in KERNELS.values():
        assert kernel().frobenius([(W, centre)], 1.0) == 1
        assert torch.equal(bits(W), bits(before))
    device_frobenius(Chunked(), [(W, centre)], 1.0)
    assert torch.equal(bits(W), bits(before))


# ------------------------------------------------------------------------------------------- memory, host, threads


@pytest.mark.parametrize("shape", [(2048, 1152), (4096, 576), (3000, 131), (1500, 128, 3, 3)])
def test_nothing_the_size_of_a_weight_is_allocated_inside(shape):
    W = torch.randn(shape).contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    centre = W.clone(memory_format=torch.preserve_format)
    W.mul_(1 + 1e-4)
    radius = torch.full((len(W),), 1e3, dtype=torch.float64)
    kernel = Chunked()

    def step():
        assert kernel.rows(W, centre, radius) == 0
        assert kernel.frobenius([(W, centre)], 1e3) == 0

    step()  # the scratch is made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    taken = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    assert taken, "the profiler saw no allocation"
    assert max(taken) < W.numel() * W.element_size() / 10


def test_nothing_waits_for_the_device():
    """On the meta device a look from the host raises, as it would stall an accelerator."""
    W = torch.empty(300, 20, 3, device="meta")
    kernel = Chunked()
    broken = kernel.rows(W, W, torch.ones(300, dtype=torch.float64, device="meta"))
    assert broken.device.type == "meta"
    device_frobenius(kernel, [(W, W)], 1.0)


@pytest.mark.parametrize("shape", [(3000, 700), (1, 100_352), (3, 300_001), (1, 700_000), (600, 64, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_number_of_threads_changes_no_bit(dtype, shape):
    generator = torch.Generator().manual_seed(16)
    centre = (torch.randn(shape, generator=generator) / 10).to(dtype)
    start = centre + (torch.randn(shape, generator=generator) / 100).to(dtype)
    radius = l1(start, centre) * torch.linspace(0.5, 1.5, len(start), dtype=torch.float64) * 0.9
    whole = float(l2(start, centre)) * 0.7
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            rows, masked, layer, device = (start.clone() for _ in range(4))
            Chunked().rows(rows, centre, radius)
            flat = (t.reshape(len(start), -1) for t in (masked, centre))
            masked = exact.rows(*flat, radius, projections.l1_rows)[0]
            Chunked().frobenius([(layer, centre)], whole)
            device_frobenius(Chunked(), [(device, centre)], whole)
            found = [rows, masked, layer, device]
            if dtype != torch.float64:
                found += (start.clone() for _ in range(3))
                Native().rows(found[-3], centre, radius)
                Native("euclidean").rows(found[-2], centre, radius)
                Native().frobenius([(found[-1], centre)], whole)
            results.append([bits(t) for t in found])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
