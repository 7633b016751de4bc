import pytest
import torch
from torch import distributed, nn

from tethertune.lab.whole_batch import WholeBatch

# What several processes give together is tested where there are several: tests/end_to_end/test_finetune.py.

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def alone():
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def passed(network, images, **options):
    """A pass in float64 inputs' own dtype: what came out, the gradients of everything, and the buffers."""
    leaf = images.clone().requires_grad_()
    with WholeBatch(**options):
        out = network(leaf)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = [out.detach(), leaf.grad, *(p.grad.clone() for p in network.parameters()), *network.buffers()]
    network.zero_grad()
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm2d, (4, 3, 5, 6)), (nn.BatchNorm1d, (7, 3))])
def test_of_one_process_it_is_batch_norm(layer, shape, options):
    torch.manual_seed(0)
    network, images = layer(3, **options), torch.randn(shape) * 3 + 100
    twin = layer(3, **options)
    found = passed(network, images, counts=True)
    leaf = images.clone().requires_grad_()
    out = twin(leaf)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    expected = [out.detach(), leaf.grad, *(p.grad for p in twin.parameters()), *twin.buffers()]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_leaves_everything_else_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    images = torch.randn(2, 3, 5, 5)
    with WholeBatch(counts=True):
        inside = network(images)
    assert torch.equal(inside, network(images))


def test_keeps_the_type_of_what_comes_in():
    network, images = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5, dtype=torch.bfloat16)
    with WholeBatch(counts=True):
        assert network(images).dtype == torch.bfloat16
