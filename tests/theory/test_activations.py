import pytest
import torch
from torch import nn

from tethertune.theory.activations import ACTIVATIONS
from tethertune.theory.graph import trace
from tethertune.theory.nodes import Elementwise

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"), (nn.ReLU6(), "hardtanh"), (nn.LeakyReLU(0.3), "leaky_relu"), (nn.ELU(0.7), "elu"),
        (nn.SELU(), "selu"), (nn.CELU(0.7), "celu"), (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.Mish(), "mish"),
        (nn.GELU(approximate="tanh"), "gelu"), (nn.Hardswish(), "hardswish"), (nn.Hardtanh(-2.0, 0.5), "hardtanh"),
        (nn.Tanh(), "tanh"), (nn.Sigmoid(), "sigmoid"), (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.Softplus(2.0), "softplus"),
    ],
    ids=str,
)  # fmt: skip
def test_activations_have_the_lipschitz_constants_that_are_said(module, name):
    model = nn.Sequential(nn.Linear(3, 3), module, nn.Linear(3, 2)).eval()
    network = trace(model, torch.zeros(2, 3), head="2")
    node = next(node for node in network.nodes if isinstance(node, Elementwise))
    assert name in ACTIVATIONS
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64, requires_grad=True)
    y = module(x)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    steepest = float(slopes.abs().max())
    assert steepest <= node.lipschitz * (1 + 1e-7)  # torch's own constants are of single precision
    assert steepest >= node.lipschitz * (1 - 2e-4)
    assert float(module(torch.zeros((), dtype=torch.float64))) == pytest.approx(node.at_zero, abs=1e-9)
    assert float(y.detach().abs().max()) <= node.ceiling + 1e-12
