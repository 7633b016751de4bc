import pytest
import torch
from torch import nn

from tethertune import norms
from tethertune.kernels import gradients
from tethertune.kernels.gradients import Chunks, Gradients, Pull
from tethertune.penalty import Penalty
from tethertune.rows import Rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of some rows, so that small tensors are cut too."""
    monkeypatch.setattr(gradients, "_CPU_CHUNK", 100)
    monkeypatch.setattr(gradients, "_DEVICE_CHUNK", 100)


def moved(shape, dtype, seed=0):
    torch.manual_seed(seed)
    centre = torch.randn(shape).to(dtype)
    return (centre + 0.1 * torch.randn(shape)).to(dtype), centre, torch.randn(shape).to(dtype)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gets_the_plain_sum(layout, centre_layout, dtype):
    W, centre, gradient = moved((7, 5, 3, 4), dtype)
    expected = (wide(gradient) + 0.25 * (wide(W) - wide(centre))).to(dtype)
    W, gradient = (LAYOUTS[layout](x.clone()) for x in (W, gradient))
    before = W.clone()
    Chunks().add_displacement(gradient, W, LAYOUTS[centre_layout](centre), 0.25)
    torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(W, before)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(), (3,), (1, 1), (1, 1000), (1000, 1), (0, 4), (4, 0)])
def test_every_shape_gets_the_plain_sum(shape):
    W, centre, gradient = moved(shape, torch.float32)
    expected = gradient + 3 * (W - centre)
    Chunks().add_displacement(gradient, W, centre, 3.0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("small_chunks")
def test_a_centre_of_one_zero_is_that_of_a_head():
    W, _, gradient = moved((9, 30), torch.float32)
    expected = gradient + 2 * W
    Chunks().add_displacement(gradient, W, torch.zeros(()).expand(W.shape), 2.0)
    torch.testing.assert_close(gradient, expected)


def test_a_scale_that_only_the_device_knows_multiplies_both():
    W, centre, gradient = moved((9, 30), torch.float32)
    scale = torch.tensor(8.0)
    expected = gradient + 16 * (W - centre)
    Chunks().add_displacement(gradient, W, centre, 2.0, scale)
    torch.testing.assert_close(gradient, expected)
    row = (W - centre).abs().sum(1).argmax()
    expected[row] += 4 * (W - centre)[row].sign()
    Chunks().add_sign_of_largest_row([gradient], [(W, centre)], 0.5, scale)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_gets_the_sign_of_its_displacement(dtype, layout, blocks):
    for seed in range(5):
        W, centre, gradient = moved((9, 5, 3, 4), dtype, seed)
        T = wide(W) - wide(centre)
        row = norms.row_sums(T.flatten(1)).argmax()
        expected = gradient.clone()
        expected[row] = (wide(expected[row]) + 0.5 * T[row].sign()).to(dtype)
        W, centre, gradient = (LAYOUTS[layout](x) for x in (W, centre, gradient))
        parts = list(zip(W.chunk(blocks), centre.chunk(blocks), strict=True))
        Chunks().add_sign_of_largest_row(gradient.chunk(blocks), parts, 0.5)
        torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.fixture(params=["native", "chunked"])
def way(request, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_BACKEND", request.param)
    return request.param


def add(norm, gradient, W, centre, factor, rows=Rows("map"), kernel=None):  # noqa: B008 - frozen
    kernel = Gradients(norm) if kernel is None else kernel
    kernel.add([Pull(gradient, W, centre, rows, factor)])
    return kernel


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
@pytest.mark.parametrize("centre_dtype", [torch.float32, torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways_add_the_same(layout, dtype, centre_dtype, norm, monkeypatch):
    W, centre, gradient = (LAYOUTS[layout](x) for x in moved((64, 7, 3, 5), dtype))
    centre = torch.zeros(()).expand(W.shape) if centre_dtype is None else LAYOUTS[layout](centre.to(centre_dtype))
    found = {}
    for name in ("native", "chunked"):
        monkeypatch.setenv("TETHERTUNE_BACKEND", name)
        found[name] = LAYOUTS[layout](gradient.clone())
        kernel = add(norm, found[name], W, centre, 0.3)
        suits = dtype is not torch.float64 and layout != "with gaps" and (norm, layout) != ("mars", "transposed")
        assert bool(kernel._rest) == (name == "chunked" or not suits)
    torch.testing.assert_close(found["native"], found["chunked"], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(found["native"], gradient)


def test_rows_that_float32_cannot_tell_apart_are_told_apart(way):
    """Row 5 is larger than all others by less than a float32 sum of it shows."""
    W = torch.ones(8, 3000)
    W[:, 0] = 1000
    W[5, 1] += 2**-23
    assert (W.abs().sum(1) == W[0].abs().sum()).all()
    gradient = torch.zeros_like(W)
    kernel = add("mars", gradient, W, torch.zeros_like(W), 1.0)
    assert gradient.any(dim=1).nonzero().tolist() == [[5]]
    assert bool(kernel._rest) == (way == "chunked")


@pytest.mark.usefixtures("way")
def test_what_has_not_moved_gets_no_gradient_and_a_row_with_a_nan_is_the_largest():
    W, gradient = torch.randn(6, 40), torch.zeros(6, 40)
    add("mars", gradient, W, W.clone(), 1.0)
    assert not gradient.any()
    centre = W + 1
    W[3, 7] = torch.nan
    add("mars", gradient, W, centre, 1.0)
    assert gradient.any(dim=1).nonzero().tolist() == [[3]]
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_gradients_and_weights_may_move_between_steps(norm):
    torch.manual_seed(0)
    W, centre = torch.randn(20, 30), torch.zeros(20, 30)
    kernel = Gradients(norm)
    kept = []
    for step in range(4):
        if step == 2:
            W = W.t().clone().t()
        W += torch.randn(20, 30)
        kept.append(torch.zeros_like(W))
        add(norm, kept[-1], W, centre, 1.0 + step, kernel=kernel)
        row = W.abs().sum(1).argmax()
        expected = W if norm == "frobenius" else torch.zeros_like(W).index_copy_(0, row[None], W[row][None].sign())
        torch.testing.assert_close(kept[-1], (1.0 + step) * expected)


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_threads_change_no_bit(norm, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_BACKEND", "native")
    torch.manual_seed(0)
    shapes = [(700, 900), (3, 70_000), (1, 500_000), (2000, 3)]
    weights = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([torch.zeros(shape) for shape in shapes])
            pulls = [Pull(g, W, c, Rows("map"), 0.1) for g, (W, c) in zip(found[-1], weights, strict=True)]
            Gradients(norm).add(pulls)
    finally:
        torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("norm", ["frobenius", "mars"])
@pytest.mark.parametrize("convention", ["operator", "authors"])
def test_a_network_gets_the_gradient_of_autograd(norm, convention):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 64, 5),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 64, 3, groups=64),
        nn.ConvTranspose2d(64, 32, 3, groups=4),
        nn.Linear(600, 500),
    ).to(memory_format=torch.channels_last)
    penalty = Penalty(model, norm=norm, strength=0.5, head="4", head_strength=0.1, convention=convention)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
        parameter.grad = torch.ones_like(parameter)
    penalty().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    penalty.attach(optimizer)
    optimizer.step()
    for parameter, of_autograd in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, of_autograd)


def test_no_copy_of_a_weight_is_made():
    W, centre, gradient = moved((1 << 12, 1 << 10), torch.float32)
    kernel = Chunks()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                own = {x.untyped_storage().data_ptr() for x in (W, centre, gradient)}
                if result.untyped_storage().data_ptr() not in own:
                    largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        kernel.add_displacement(gradient, W, centre, 0.1)
        kernel.add_sign_of_largest_row([gradient], [(W, centre)], 0.1)
    assert 0 < largest <= W.nbytes / 8
