"""What a linear map of a traced network is made of, and what is folded into it."""

import pytest
import torch
from torch import nn

from tethertune.theory import operator_norms
from tethertune.theory.graph import trace
from tethertune.theory.nodes import Linear, NotCoveredError
from tethertune.theory.sample import tensors

torch.set_num_threads(1)


def maps(model, size=(3, 8, 8), head="2"):
    network = trace(model.eval(), torch.zeros(2, *size), head=head)
    return network, list(network.linears.values())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, groups=1),
        nn.Conv2d(3, 6, 3, groups=3, bias=False),
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.ConvTranspose2d(3, 6, 2, groups=3),
    ],
    ids=str,
)
def test_folding_changes_no_output(layer):
    """The map with its folded weight and bias gives what the layer and its batch norm give."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(layer.out_channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(
        nn.Sequential(layer, norm),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(layer.out_channels, 2),
    ).double()
    network = trace(model.eval(), torch.zeros(2, 3, 8, 8, dtype=torch.float64), head="2")
    (node,) = network.linears.values()
    weight, bias = node.folded(tensors(model))
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = model[0](images)
    layer.weight.data.copy_(weight)
    layer.bias = nn.Parameter(bias)
    assert torch.allclose(layer(images), expected, atol=1e-12)


def test_a_batch_norm_alone_is_its_scale():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
    nn.init.uniform_(model[0].weight, 0.5, 2)
    _, (node,) = maps(model)
    scale, bias = node.folded(tensors(model))
    assert (node.weight, scale.shape, bias.shape) == (None, (3,), (3,))
    assert node.geometry.mars(scale) == pytest.approx(operator_norms(model[0], (3, 8, 8)).mars, rel=1e-12)


def test_a_map_without_batch_norm_has_no_scale():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(144, 2))
    network, (node,) = maps(model)
    assert isinstance(node, Linear)
    assert node.scale(tensors(model)) is None
    assert node.folded(tensors(model))[1] is None
    assert node.parameters == ("0.weight",)
    assert network.head.parameters == ("2.weight", "2.bias")


def test_a_refusal_keeps_the_node_and_the_reason():
    error = NotCoveredError("blocks.0.se", "it multiplies features by features")
    assert (error.node, error.reason) == ("blocks.0.se", "it multiplies features by features")
    assert str(error) == "blocks.0.se is not covered by any proven bound: it multiplies features by features."
