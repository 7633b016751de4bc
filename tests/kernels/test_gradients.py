import pytest
import torch
from torch import nn

from tethertune import norms
from tethertune.kernels import gradients
from tethertune.kernels.gradients import Gradients
from tethertune.penalty import Penalty

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
    Gradients().add_displacement(gradient, W, LAYOUTS[centre_layout](centre), 0.25)
    torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(W, before)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(), (3,), (1, 1), (1, 1000), (1000, 1), (0, 4), (4, 0)])
def test_every_shape_gets_the_plain_sum(shape):
    W, centre, gradient = moved(shape, torch.float32)
    expected = gradient + 3 * (W - centre)
    Gradients().add_displacement(gradient, W, centre, 3.0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("small_chunks")
def test_a_centre_of_one_zero_is_that_of_a_head():
    W, _, gradient = moved((9, 30), torch.float32)
    expected = gradient + 2 * W
    Gradients().add_displacement(gradient, W, torch.zeros(()).expand(W.shape), 2.0)
    torch.testing.assert_close(gradient, expected)


def test_a_scale_that_only_the_device_knows_multiplies_both():
    W, centre, gradient = moved((9, 30), torch.float32)
    scale = torch.tensor(8.0)
    expected = gradient + 16 * (W - centre)
    Gradients().add_displacement(gradient, W, centre, 2.0, scale)
    torch.testing.assert_close(gradient, expected)
    row = (W - centre).abs().sum(1).argmax()
    expected[row] += 4 * (W - centre)[row].sign()
    Gradients().add_sign_of_largest_row([gradient], [(W, centre)], 0.5, scale)
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
        Gradients().add_sign_of_largest_row(gradient.chunk(blocks), parts, 0.5)
        torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("blocks", [1, 2])
def test_rows_that_float32_cannot_tell_apart_are_told_apart(blocks):
    """Row 5 is larger than all others by less than a float32 sum of it shows."""
    W = torch.ones(8, 3000)
    W[:, 0] = 1000
    W[5, 1] += 2**-23
    assert (W.abs().sum(1) == W[0].abs().sum()).all()
    centre, gradient = torch.zeros_like(W), torch.zeros_like(W)
    parts = list(zip(W.chunk(blocks), centre.chunk(blocks), strict=True))
    Gradients().add_sign_of_largest_row(gradient.chunk(blocks), parts, 1.0)
    assert gradient.any(dim=1).nonzero().tolist() == [[5]]


def test_what_has_not_moved_gets_no_gradient_and_a_row_with_a_nan_is_the_largest():
    W, gradient = torch.randn(6, 40), torch.zeros(6, 40)
    Gradients().add_sign_of_largest_row([gradient], [(W, W.clone())], 1.0)
    assert not gradient.any()
    centre = W + 1
    W[3, 7] = torch.nan
    Gradients().add_sign_of_largest_row([gradient], [(W, centre)], 1.0)
    assert gradient.any(dim=1).nonzero().tolist() == [[3]]
    assert gradient.isfinite().all()


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
    kernel = Gradients()
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
