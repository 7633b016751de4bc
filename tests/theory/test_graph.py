import pytest
import torch
from torch import nn
from torch.nn import functional

from tethertune.errors import ConfigurationError
from tethertune.theory import operator_norms
from tethertune.theory.graph import trace
from tethertune.theory.nodes import Concat, Elementwise, Fixed, Input, Linear, MaxPool, NotCoveredError, Shift, Sum
from tethertune.theory.sample import tensors

torch.set_num_threads(1)
IMAGES = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """Convolution, any function of its output, global pooling, head."""

    def __init__(self, function, channels=4, **modules):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        self.fc = nn.Linear(channels, 2)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        y = self.function(self, self.conv(x))
        return self.fc(y.mean((2, 3)) if y.ndim == 4 else y)


def kinds(function, channels=4, **modules):
    network = trace(Net(function, channels, **modules).eval(), IMAGES, head="fc")
    return [type(node) for node in network.nodes[2:-1]], network


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda _, x: functional.relu(x), [Elementwise]),
        (lambda _, x: torch.relu_(x * 2), [Fixed, Elementwise]),
        (lambda _, x: x + functional.relu(x), [Elementwise, Sum]),
        (lambda _, x: functional.dropout(x, 0.5, training=False) + 1.5, [Fixed, Shift]),
        (lambda _, x: x - functional.gelu(x), [Elementwise, Sum]),
        (lambda _, x: torch.cat((x[:, :2], functional.silu(x)[:, 2:]), 1), [Fixed, Elementwise, Fixed, Concat]),
        (lambda _, x: functional.max_pool2d(x, 3, 2, 1), [MaxPool]),
        (lambda _, x: functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2), [MaxPool]),
        (lambda _, x: functional.avg_pool2d(x, 2) / 3, [Fixed, Fixed]),
        (lambda _, x: functional.adaptive_avg_pool2d(x, 2), [Fixed]),
        (lambda _, x: functional.interpolate(x, scale_factor=2), [Fixed]),
        (lambda _, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), [Fixed] * 3),
        (lambda _, x: torch.cat(x.chunk(2, 1)[::-1], 1), [Fixed, Fixed, Fixed, Concat]),
    ],
)
def test_functions_become_nodes(function, expected):
    found, network = kinds(function)
    assert isinstance(network.nodes[0], Input)
    assert isinstance(network.nodes[1], Linear)
    assert found == expected


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda _, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), "multiplies features by features"),
        (lambda _, x: torch.softmax(x, 1), "softmax"),
        (lambda _, x: functional.layer_norm(x, x.shape[1:]), "LayerNorm"),
        (lambda _, x: functional.group_norm(x, 2), "GroupNorm"),
        (lambda _, x: functional.batch_norm(x, None, None, training=True), "batch norm in training mode"),
        (lambda _, x: x + x.mean(0, keepdim=True), "averages over the examples"),
        (lambda _, x: x + x.transpose(0, 1).reshape(2, 4, 8, 8), "from one example to another"),
        (lambda _, x: x / x.abs(), "divides features by features"),
        (lambda _, x: x + x[:, :1], "different shapes"),
        (lambda _, x: functional.pad(x, (1, 1, 1, 1), value=3.0), "not a feature"),
        (lambda m, x: functional.conv2d(x, m.other.weight * 2), "weight is computed"),
        (lambda _, x: torch.sin(x), "the operator sin is not known"),
        (lambda _, x: torch.cat((x, x))[:2], "joins batches"),
        (lambda _, x: functional.dropout(x, 0.5, training=True), "dropout that is on in eval mode"),
        (lambda _, x: torch.div(x, 0.1, rounding_mode="floor"), "it rounds"),
        (lambda m, x: torch.clamp(x, min=m.other.bias.sum()), "its min is computed"),
        (lambda _, x: functional.celu(x, alpha=-1.0), "its alpha is -1, not above 0"),
        (lambda _, x: functional.softplus(x, beta=-1.0), "its beta is -1, not above 0"),
        (lambda _, x: functional.softplus(x, 1.0, 0.0), "its threshold is 0, where it jumps"),
        (lambda _, x: functional.max_pool1d(x.mean((2, 3)), 4).expand(-1, 4), "max_pool1d takes a value of 2 axes"),
        (
            lambda _, x: functional.max_pool2d(x.mean(1), [8]).flatten(1).expand(-1, 4),
            "max_pool2d takes a value of 3 axes",
        ),
        (
            lambda _, x: functional.avg_pool2d(x.mean(1), 8, divisor_override=1).flatten(1).expand(-1, 4),
            "avg_pool2d takes a value of 3 axes",
        ),
        (lambda _, x: functional.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), "pads the axis of the examples"),
        (lambda _, x: functional.hardtanh(x.view(torch.int32) * 1e-6), "turns torch.float32 into torch.int32"),
        (lambda _, x: x.double().float(), "turns torch.float32 into torch.float64"),
        (lambda _, x: (x.view(2, -1), torch.mul(x, 1e6, out=x))[0].view_as(x) * 1.0, "writes into its argument out"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(function, names):
    with pytest.raises(NotCoveredError, match=names) as error:
        trace(Net(function, other=nn.Conv2d(4, 4, 1)).eval(), IMAGES, head="fc")
    assert error.value.node


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_that_round_each_value_coarsely_are_refused(dtype):
    """A rounding is a step: however little the weights move, a value on the edge moves by a whole unit."""
    model = Net(lambda _, x: torch.relu(x)).eval().to(dtype)
    with pytest.raises(NotCoveredError, match=f"values are {dtype}"):
        trace(model, IMAGES.to(dtype), head="fc")


def test_a_padded_copy_is_what_was_padded_whatever_became_of_that():
    def function(_, x):
        padded = functional.pad(x, (1, 1, 1, 1), value=-torch.inf)
        x.mul_(1e-4)
        return functional.max_pool2d(padded, 2)

    network = trace(Net(function).eval(), IMAGES, head="fc")
    pool = next(node for node in network.nodes if isinstance(node, MaxPool))
    assert isinstance(network.nodes[pool.inputs[0]], Linear)


def test_a_refusal_names_the_module():
    norm = nn.LayerNorm([4, 8, 8])
    with pytest.raises(NotCoveredError, match=r"^norm \(layer_norm\) is not covered"):
        trace(Net(lambda m, x: m.norm(x), norm=norm).eval(), IMAGES, head="fc")


def test_what_works_in_place_is_what_later_nodes_read():
    def function(_, x):
        y = x + 0.0
        torch.relu_(y)
        return y + 1.0

    found, network = kinds(function)
    assert found == [Shift, Elementwise, Shift]
    assert network.nodes[4].inputs == (3,)


def test_a_view_of_overwritten_memory_is_refused():
    def function(_, x):
        view = x.flatten(1)
        torch.relu_(x)
        return x + view.view(x.shape)

    with pytest.raises(NotCoveredError, match="overwrites memory"):
        kinds(function)


def test_batch_norm_is_folded_unless_something_else_reads_the_map():
    folded, network = kinds(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(4))
    assert folded == []
    assert network.nodes[1].norm is not None
    apart, network = kinds(lambda m, x: m.norm(x) + x, norm=nn.BatchNorm2d(4))
    assert apart == [Linear, Sum]
    assert network.nodes[1].norm is None
    assert network.nodes[2].weight is None


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_padding_belongs_to_the_convolution(mode):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    _, network = kinds(lambda m, x: m.other(x), other=layer)
    node = next(node for node in network.linears.values() if node.weight == "other.weight")
    weight, _ = node.folded(tensors(layer) | {"other.weight": layer.weight, "other.bias": layer.bias})
    assert node.geometry.mars(weight) == operator_norms(layer, (4, 8, 8)).mars
    assert node.inputs == (1,)


def test_logits_that_grow_after_the_head_are_refused_and_others_are_not():
    class Scaled(Net):
        def forward(self, x):
            return super().forward(x) * self.factor

    for factor, grows in ((10.0, True), (0.5, False)):
        model = Scaled(lambda _, x: x)
        model.factor = factor
        if grows:
            with pytest.raises(NotCoveredError, match="10 times as large after the head"):
                trace(model.eval(), IMAGES, head="fc")
        else:
            assert trace(model.eval(), IMAGES, head="fc").head.weight == "fc.weight"


def test_batch_norm_over_places_scales_no_rows():
    """A Linear layer applied at as many places as it has outputs: the batch norm's channels are the places."""
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2)).eval()
    network = trace(model, IMAGES, head="4")
    maps = list(network.linears.values())
    assert [node.norm is None for node in maps] == [True, False]
    assert maps[1].weight is None


def test_heads():
    network = trace(Net(lambda _, x: x.relu()).eval(), IMAGES, head="fc")
    assert network.head.weight == "fc.weight"
    assert network.head.fan_in == 4
    with pytest.raises(ConfigurationError, match="is not the linear map that makes the logits: that is fc"):
        trace(Net(lambda _, x: x).eval(), IMAGES, head="conv")
    with pytest.raises(ConfigurationError, match="two examples"):
        trace(Net(lambda _, x: x).eval(), IMAGES[:1], head="fc")
    two = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(NotCoveredError, match="one vector of features"):
        trace(two, IMAGES, head="1")


def test_training_mode_is_refused():
    model = Net(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(4)).train()
    with pytest.raises(ConfigurationError, match=r"norm is a batch norm in training mode: call model.eval\(\)"):
        trace(model, IMAGES, head="fc")


def test_a_network_that_cannot_be_exported():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NotCoveredError, match="cannot be exported"):
        trace(Branching(), IMAGES, head="fc")


def test_two_outputs_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(x), x + 1

    with pytest.raises(NotCoveredError, match="one tensor of logits"):
        trace(Two(), IMAGES, head="fc")
