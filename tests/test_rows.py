"""Rows against the dense matrix of each module's linear map, whose columns are the images of the unit vectors."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from tethertune import rows
from tethertune.errors import ConfigurationError, PatternError

torch.set_num_threads(1)


def dense(layer, *shape):
    """The matrix (outputs, inputs) of an affine map of inputs of ``shape`` (without the batch), output last."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    layer = layer.double()
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T


def channel_sums(layer, *shape):
    """The largest l1 row sum of the dense matrix in each output channel: that of an output with its full kernel."""
    matrix = dense(layer, *shape)
    return matrix.abs().sum(1).reshape(layer.out_channels, -1).amax(1)


def row_sums(layer, **options):
    return rows.view(layer.weight.detach(), layer, **options).abs().sum(1)


class Conv1D(nn.Module):
    """As transformers writes it: the weight is (in, out)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def test_linear_is_its_own_matrix():
    layer = nn.Linear(5, 3)
    torch.testing.assert_close(rows.view(layer.weight, layer).double(), dense(layer, 5))


def test_bilinear_has_a_row_for_every_output_unit():
    layer = nn.Bilinear(2, 3, 4)
    assert rows.view(layer.weight, layer).shape == (4, 6)
    torch.testing.assert_close(rows.view(layer.weight, layer)[1], layer.weight[1].flatten())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3), (3, 7)),
        (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5)),
        (nn.Conv2d(2, 3, 3, stride=2, dilation=2), (2, 9, 9)),
        (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 4, 4)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 4, 4)),
        (nn.Conv2d(4, 8, 3, groups=4), (4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3), (4, 5)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5)),
        (nn.ConvTranspose2d(2, 3, 3), (2, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 4, 4)),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), (4, 4, 4)),
        (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3)),
    ],
    ids=str,
)
def test_the_rows_of_a_convolution_are_the_rows_of_its_matrix(layer, shape):
    expected = channel_sums(layer, *shape)
    torch.testing.assert_close(row_sums(layer), expected)
    assert rows.of(layer, "weight").shape(layer.weight) == tuple(rows.view(layer.weight, layer).shape)


def test_the_rows_of_a_channels_last_weight_are_the_same():
    layer = nn.Conv2d(3, 4, 3)
    expected = rows.view(layer.weight, layer).clone()
    layer = layer.to(memory_format=torch.channels_last)
    assert torch.equal(rows.view(layer.weight, layer), expected)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), Conv1D(3, 2)], ids=lambda m: type(m).__name__
)
def test_blocks_are_views_that_together_are_the_matrix(layer):
    cut = rows.of(layer, "weight")
    weight = layer.weight.detach()
    blocks = cut.blocks(weight)
    torch.testing.assert_close(torch.cat([block.flatten(1) for block in blocks]), cut.matrix(weight))
    for block in blocks:
        block.zero_()
    assert not weight.any()


def test_the_projections_of_attention_have_a_row_for_every_output_unit():
    layer = nn.MultiheadAttention(4, 2)
    found = {each.name: each.rows for each in rows.layers(layer)}
    assert found["in_proj_weight"].matrix(layer.in_proj_weight).shape == (12, 4)
    torch.testing.assert_close(
        found["out_proj.weight"].matrix(layer.out_proj.weight).double(), dense(layer.out_proj, 4)
    )
    assert {name for name, cut in found.items() if cut.free} == {"in_proj_bias", "out_proj.bias"}


def test_separate_projections_of_attention_have_a_row_for_every_output_unit():
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
    found = {each.name: each for each in rows.layers(layer)}
    shapes = {name: each.rows.shape(each.weight) for name, each in found.items() if not each.rows.free}
    assert shapes == {
        "q_proj_weight": (4, 4),
        "k_proj_weight": (4, 3),
        "v_proj_weight": (4, 5),
        "out_proj.weight": (4, 4),
    }
    torch.testing.assert_close(
        found["k_proj_weight"].rows.matrix(layer.k_proj_weight) @ torch.eye(3),
        nn.functional.linear(torch.eye(3), layer.k_proj_weight).T,
    )
    assert {found["bias_k"].rows.kind, found["bias_v"].rows.kind} == {"bias"}


@pytest.mark.parametrize(
    ("layer", "gates"), [(nn.LSTM(3, 5), 4), (nn.GRU(3, 5), 3), (nn.RNN(3, 5), 1)], ids=["LSTM", "GRU", "RNN"]
)
def test_a_recurrent_layer_has_a_row_for_every_gate_unit(layer, gates):
    shapes = {each.name: each.rows.shape(each.weight) for each in rows.layers(layer) if not each.rows.free}
    assert shapes == {"weight_ih_l0": (5 * gates, 3), "weight_hh_l0": (5 * gates, 5)}


def test_a_recurrent_weight_is_the_map_from_input_to_gates():
    layer = nn.RNN(3, 5, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        layer.weight_ih_l0.abs_()  # so that relu is the identity here
        outputs = layer(torch.eye(3, dtype=torch.float64).unsqueeze(0))[0].squeeze(0)
    weight = next(each for each in rows.layers(layer) if each.name == "weight_ih_l0")
    torch.testing.assert_close(weight.rows.matrix(weight.weight), outputs.T)


def test_a_projected_lstm_and_a_cell_have_rows_for_their_units():
    layer = nn.LSTM(3, 5, proj_size=2)
    shapes = {each.name: each.rows.shape(each.weight) for each in rows.layers(layer) if not each.rows.free}
    assert shapes == {"weight_ih_l0": (20, 3), "weight_hh_l0": (20, 2), "weight_hr_l0": (2, 5)}
    cell = nn.GRUCell(3, 5)
    assert {each.name: each.rows.kind for each in rows.layers(cell)} == {
        "weight_ih": "map",
        "weight_hh": "map",
        "bias_ih": "bias",
        "bias_hh": "bias",
    }


def test_the_conv1d_of_transformers_has_its_rows_on_axis_1():
    layer = Conv1D(3, 5)
    torch.testing.assert_close(rows.view(layer.weight, layer).double(), dense(layer, 5))
    other = type("Conv1D", (nn.Module,), {"__module__": "elsewhere"})()
    other.weight = nn.Parameter(torch.zeros(5, 3))
    assert rows.of(other, "weight") == rows.Rows("other")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_is_free_unless_included(kind):
    model = nn.Sequential(kind(7, 3), nn.Linear(3, 2))
    found = rows.layers(model)
    assert [layer.name for layer, taken in rows.select(found) if taken] == ["1.weight"]
    assert [layer.name for layer, taken in rows.select(found, include=["0"]) if taken] == ["0.weight", "1.weight"]
    assert found[0].rows == rows.Rows("embedding")
    torch.testing.assert_close(found[0].rows.matrix(found[0].weight)[4], model[0].weight[4])


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "T5LayerNorm", "RmsNorm"])
def test_a_normalisation_layer_that_a_language_model_brings_along_is_known_by_what_it_is_called(name):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert rows.of(type(name, (Plain,), {})(), "weight").kind == "normalisation"
    assert rows.of(Plain(), "weight").kind == "other"


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)],
    ids=lambda m: type(m).__name__,
)
def test_normalisation_is_free(layer):
    cut = rows.of(layer, "weight")
    assert cut.kind == "normalisation"
    assert cut.free
    assert cut.matrix(layer.weight).shape == (4, 1)


def test_the_authors_constrain_the_scale_of_batch_norm():
    assert rows.of(nn.BatchNorm2d(4), "weight", convention="authors") == rows.Rows("scale")
    assert not rows.of(nn.BatchNorm2d(4), "weight", convention="authors").free
    assert rows.of(nn.BatchNorm2d(4), "bias", convention="authors").free
    without = nn.BatchNorm2d(4, track_running_stats=False)
    assert rows.of(without, "weight", convention="authors").kind == "normalisation"
    assert rows.of(nn.LayerNorm(4), "weight", convention="authors").kind == "normalisation"


def test_the_authors_take_a_depthwise_kernel_as_one_row():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    assert row_sums(layer, convention="authors").tolist() == pytest.approx([layer.weight.abs().sum().item()])
    assert rows.view(nn.Conv2d(4, 4, 3).weight, nn.Conv2d(4, 4, 3), convention="authors").shape == (4, 36)
    assert rows.view(nn.Conv2d(1, 4, 3).weight, nn.Conv2d(1, 4, 3), convention="authors").shape == (4, 9)


def test_an_unknown_convention_is_refused():
    with pytest.raises(ConfigurationError, match="convention='keras'"):
        rows.of(nn.Linear(2, 2), "weight", convention="keras")


def test_parameters_of_unknown_modules_are_free():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))
            self.gamma = nn.Parameter(torch.tensor(1.0))

    model = nn.Sequential(Scale(), nn.PReLU())
    found = {layer.name: layer for layer in rows.layers(model)}
    assert {name: (layer.rows.kind, layer.rows.free) for name, layer in found.items()} == {
        "0.weight": ("other", True),
        "0.gamma": ("other", True),
        "1.weight": ("other", True),
    }
    assert found["0.gamma"].rows.matrix(found["0.gamma"].weight).shape == (1, 1)
    assert found["0.gamma"].rows.shape(found["0.gamma"].weight) == (1, 1)


def test_an_empty_weight_has_no_rows():
    layer = nn.Conv2d(3, 4, 3)
    assert rows.of(layer, "weight").shape(torch.empty(0, 3, 3, 3)) == (0, 0)


def test_tied_parameters_are_one_layer_with_aliases():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "mix": nn.Linear(3, 3), "out": nn.Linear(3, 7, bias=False)})
    model["out"].weight = model["embed"].weight
    model["again"] = model["mix"]
    found = {layer.name: layer for layer in rows.layers(model)}
    assert set(found) == {"out.weight", "mix.weight", "mix.bias"}
    assert found["out.weight"].aliases == ("embed.weight",)
    assert found["out.weight"].rows.kind == "map"
    assert found["mix.weight"].names == ("mix.weight", "again.weight")


def test_two_parameters_over_one_storage_are_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert next(layer.names for layer in rows.layers(model)) == ("0.weight", "1.weight")


def test_parameters_without_memory_are_not_tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).to("meta")
    assert [layer.name for layer in rows.layers(model)] == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("layer1.0.weight", "layer1.0.weight"),
        ("module.layer1.weight", "layer1.weight"),
        ("_orig_mod.layer1.weight", "layer1.weight"),
        ("module._orig_mod.layer1.weight", "layer1.weight"),
        ("_orig_mod.module.layer1.weight", "layer1.weight"),
        ("layer1._orig_mod.weight", "layer1.weight"),
        ("layer1._checkpoint_wrapped_module.weight", "layer1.weight"),
        ("layer1.module.weight", "layer1.module.weight"),
        ("module", "module"),
    ],
)
def test_clean_name(given, clean):
    assert rows.clean_name(given) == clean


def test_a_wrapped_model_has_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    names = [layer.name for layer in rows.layers(model, head="2")]
    assert [layer.name for layer in rows.layers(torch.compile(model), head="2")] == names
    assert [layer.name for layer in rows.layers(nn.DataParallel(model), head="2")] == names
    assert names == [name for name, _ in model.named_parameters()]


def test_a_layer_looks_its_parameter_up_at_each_use():
    model = nn.Linear(3, 2)
    weight = rows.layers(model)[0]
    model.weight = nn.Parameter(torch.zeros(2, 3))
    assert weight.weight is model.weight


@pytest.mark.parametrize("head", ["fc", "fc.weight", "f*"])
def test_the_head_is_a_module_a_parameter_or_a_pattern(head):
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(4, 2), "fcx": nn.Linear(2, 2)})
    roles = {layer.name: layer.role for layer in rows.layers(model, head=head)}
    expected = {"fc": {"fc.weight", "fc.bias"}, "fc.weight": {"fc.weight"}}
    everything = {"fc.weight", "fc.bias", "fcx.weight", "fcx.bias"}
    assert {name for name, role in roles.items() if role == "head"} == expected.get(head, everything)
    assert {layer.role for layer in rows.layers(model)} == {"body"}


def test_a_pattern_that_matches_nothing_is_refused_with_a_suggestion():
    model = nn.ModuleDict({"layer1": nn.Linear(3, 4), "classifier": nn.Linear(4, 2)})
    with pytest.raises(PatternError, match=r"head='clasifier' matches no parameter.* Did you mean 'classifier'"):
        rows.layers(model, head="clasifier")
    found = rows.layers(model)
    with pytest.raises(PatternError, match=r"exclude='layer9.\*' matches no parameter.*'layer1.weight'"):
        list(rows.select(found, exclude=["layer9.*"]))
    with pytest.raises(PatternError, match="it has none"):
        rows.layers(nn.ReLU(), head="fc")


def test_exclude_wins_over_include_and_knows_aliases():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    found = rows.layers(model)
    assert [layer.name for layer, taken in rows.select(found, include=["*"], exclude=["b"]) if taken] == ["a.bias"]


def test_a_weight_tied_between_head_and_body_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "out": nn.Linear(3, 7, bias=False)})
    model["out"].weight = model["embed"].weight
    with pytest.raises(ConfigurationError, match=r"out.weight belongs to the head and is tied to embed.weight"):
        rows.layers(model, head="out")


def test_two_parameters_of_one_name_are_refused():
    model = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})
    with pytest.raises(ConfigurationError, match=r"Two parameters are called 'fc.weight'"):
        rows.layers(model)


def test_reparametrised_weights_are_not_the_map_itself():
    layer = nn.utils.spectral_norm(nn.Linear(3, 2))
    pruned = nn.Linear(3, 2)
    nn.utils.prune.identity(pruned, "weight")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    for model in (layer, pruned, normed):
        assert all(each.rows.free for each in rows.layers(model))


def test_a_parameter_that_is_not_initialised_yet_is_refused():
    with pytest.raises(ConfigurationError, match=r"0.weight is not initialised yet"):
        rows.layers(nn.Sequential(nn.LazyLinear(3)))


def test_layers_belong_to_their_own_model():
    model = nn.Linear(3, 2)
    clone = copy.deepcopy(model)
    assert rows.layers(clone)[0].weight is clone.weight
