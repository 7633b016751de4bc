import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tethertune.errors import ConfigurationError
from tethertune.theory import operator_norms
from tethertune.theory.operators import fold

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")


def matrix_of(function, size):
    """The matrix of a linear map, built by pushing every unit vector through it (rows: outputs)."""
    basis = torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, *size)
    with torch.no_grad():
        return (function(basis) - function(torch.zeros_like(basis))).flatten(1).T


def check(norms, matrix, *, spectral=("exact", "upper")):
    expected = {
        "mars": matrix.abs().sum(1).max(),
        "one": matrix.abs().sum(0).max(),
        "frobenius": matrix.norm(),
        "two_one": matrix.norm(dim=1).sum(),
    }
    for name, value in expected.items():
        assert getattr(norms, name) == pytest.approx(float(value), rel=1e-10), name
    true = float(torch.linalg.matrix_norm(matrix, 2))
    assert norms.spectral_is in spectral
    if norms.spectral_is == "exact":
        assert norms.spectral == pytest.approx(true, rel=1e-10)
    else:
        assert norms.spectral >= true * (1 - 1e-12)
    assert norms.kernel_mars >= norms.mars * (1 - 1e-12)
    # Inequalities between the norms of one matrix.
    rows, columns = matrix.shape
    assert true <= norms.frobenius * (1 + 1e-12) <= norms.two_one * (1 + 1e-11)
    assert norms.two_one <= math.sqrt(rows) * norms.frobenius * (1 + 1e-11)
    assert norms.mars <= math.sqrt(columns) * true * (1 + 1e-11)
    assert norms.spectral <= math.sqrt(norms.mars * norms.one) * (1 + 1e-11)


SIZES = [(4, 5, 7), (4, 6, 6), (4, 3, 3)]
KERNELS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    {"kernel_size": 5, "padding": 2, "stride": 3},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
]


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolution_equals_the_matrix_of_its_unit_vectors(kernel, size, mode):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **kernel, padding_mode=mode).double()
    matrix = matrix_of(layer, size)
    check(operator_norms(layer, size), matrix, spectral=("exact",))
    # The same map by the bounds that are used where the matrix is too large.
    assert operator_norms(layer, size, spectral="estimate").spectral <= float(
        torch.linalg.matrix_norm(matrix, 2) * (1 + 1e-12)
    )


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_spectral_bounds_hold_where_the_matrix_is_too_large(monkeypatch, kernel, size, mode):
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 8, **kernel, padding_mode=mode).double()
    matrix = matrix_of(layer, size)
    monkeypatch.setattr("tethertune.theory.spectral._ENTRIES", 0)
    check(operator_norms(layer, size), matrix)
    fast = operator_norms(layer, size, spectral="fast")
    check(fast, matrix)
    stride = layer.stride
    whole = all(
        n % s == 0 and -(-n // s) == o
        for n, s, o in zip(size[1:], stride, layer(torch.zeros(1, *size).double()).shape[2:], strict=True)
    )
    if mode == "circular" and whole:
        assert operator_norms(layer, size).spectral_is == "exact"


@pytest.mark.parametrize("size", [(3, 9), (3, 4)], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolution_over_one_dimension(size, mode):
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 6, 3, stride=2, padding=1, groups=3, padding_mode=mode).double()
    check(operator_norms(layer, size), matrix_of(layer, size), spectral=("exact",))
    layer = nn.ConvTranspose1d(3, 6, 3, stride=2, padding=1, output_padding=1).double()
    check(operator_norms(layer, size), matrix_of(layer, size), spectral=("exact",))


TRANSPOSED = [
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": 2, "stride": 3, "output_padding": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": (1, 3), "stride": (2, 1), "groups": 2},
]


@pytest.mark.parametrize("kernel", TRANSPOSED, ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_transposed_convolution(monkeypatch, kernel, large):
    torch.manual_seed(0)
    if large:
        monkeypatch.setattr("tethertune.theory.spectral._ENTRIES", 0)
    layer = nn.ConvTranspose2d(4, 6, **kernel).double()
    for size in ((4, 3, 5), (4, 2, 2)):
        matrix = matrix_of(layer, size)
        check(operator_norms(layer, size), matrix)
        check(operator_norms(layer, size, spectral="fast"), matrix)


def test_a_transposed_convolution_is_the_transpose():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False).double()
    adjoint = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, bias=False).double()
    adjoint.weight.data.copy_(layer.weight.data)
    a, b = operator_norms(layer, (3, 6, 8)), operator_norms(adjoint, (4, 3, 4))
    assert (a.mars, a.one) == pytest.approx((b.one, b.mars), rel=1e-12)
    assert (a.frobenius, a.spectral) == pytest.approx((b.frobenius, b.spectral), rel=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, stride=3, ceil_mode=True),
        nn.AvgPool2d(3, stride=2, ceil_mode=True, padding=1, count_include_pad=False),
        nn.AvgPool2d((2, 3), divisor_override=5),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveAvgPool2d((None, 2)),
    ],
    ids=str,
)
def test_average_pooling(layer):
    size = (3, 5, 7)
    check(operator_norms(layer, size), matrix_of(layer, size), spectral=("exact",))


def test_average_pooling_over_one_dimension():
    for layer in (nn.AvgPool1d(3, 2, padding=1), nn.AdaptiveAvgPool1d(2)):
        check(operator_norms(layer, (3, 7)), matrix_of(layer, (3, 7)), spectral=("exact",))


def test_linear_at_many_places():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    check(operator_norms(layer, (5,)), matrix_of(layer, (5,)), spectral=("exact",))
    check(operator_norms(layer, (2, 4, 5)), matrix_of(layer, (2, 4, 5)), spectral=("exact",))


def trained_norm(channels):
    norm = nn.BatchNorm2d(channels).double()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 3.0)
    return norm.eval()


def test_batch_norm_alone_and_folded():
    torch.manual_seed(0)
    norm = trained_norm(4)
    check(operator_norms(norm, (4, 3, 5)), matrix_of(norm, (4, 3, 5)), spectral=("exact",))
    for layer in (
        nn.Conv2d(3, 4, 3, padding=1, stride=2).double(),
        nn.Conv2d(3, 4, 3, bias=False).double(),
        nn.ConvTranspose2d(3, 4, 3).double(),
    ):
        both = nn.Sequential(layer, norm).eval()
        check(operator_norms(both, (3, 4, 5)), matrix_of(both, (3, 4, 5)), spectral=("exact",))
        weight, bias = fold(layer, norm)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        apply = functional.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else functional.conv2d
        folded = apply(x, weight, bias, layer.stride, layer.padding)
        torch.testing.assert_close(folded, both(x))


def test_a_displacement_is_measured_by_giving_its_weight():
    torch.manual_seed(0)
    a, b = (nn.Conv2d(2, 3, 3, padding=1).double() for _ in range(2))
    size = (2, 4, 4)
    difference = operator_norms(a, size, weight=a.weight - b.weight)
    check(difference, matrix_of(a, size) - matrix_of(b, size))
    first, second = operator_norms(a, size), operator_norms(b, size)
    for name in ("mars", "frobenius", "two_one", "one", "kernel_mars"):
        assert getattr(difference, name) <= getattr(first, name) + getattr(second, name)


@given(st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_output_channels_does_not_matter(order):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 3, padding=1, stride=2)
    before, after = (operator_norms(layer, (2, 5, 5), weight=w) for w in (layer.weight, layer.weight[list(order)]))
    for name in ("mars", "frobenius", "two_one", "one", "spectral", "kernel_mars"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-12)


def ones(layer):
    nn.init.ones_(layer.weight)
    return layer


def test_worked_numbers():
    plain = operator_norms(ones(nn.Conv2d(1, 1, 3, padding=1)), (1, 4, 4))
    assert (plain.mars, plain.one, plain.frobenius) == pytest.approx((9, 9, 10), rel=1e-12)
    assert plain.spectral == pytest.approx((1 + 2 * math.cos(math.pi / 5)) ** 2, rel=1e-9)
    assert plain.spectral == pytest.approx(6.854101966249686, rel=1e-9)
    assert plain.two_one == pytest.approx(39.59591794226543, rel=1e-9)
    strided = operator_norms(ones(nn.Conv2d(1, 1, 3, padding=1, stride=2)), (1, 4, 4))
    assert (strided.mars, strided.one, strided.frobenius) == pytest.approx((9, 4, 5), rel=1e-12)
    assert (strided.spectral, strided.two_one) == pytest.approx((3.618033988749895, 9.898979485566356), rel=1e-9)
    transposed = nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=1)
    adjoint = operator_norms(ones(transposed), (1, 2, 2))
    assert (adjoint.mars, adjoint.one, adjoint.frobenius) == pytest.approx((4, 9, 5), rel=1e-12)
    assert (adjoint.spectral, adjoint.two_one) == pytest.approx((3.618033988749895, 19.48528137423857), rel=1e-9)


def test_a_map_smaller_than_the_kernel_never_sees_the_whole_row():
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 1, 5, padding=2).double()
    norms = operator_norms(layer, (1, 1, 1))
    assert norms.mars == pytest.approx(abs(float(layer.weight[0, 0, 2, 2].detach())), rel=1e-12)
    assert norms.kernel_mars > norms.mars


def test_mars_is_constant_in_resolution_and_frobenius_grows():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    small, large = (operator_norms(layer, (3, n, n), spectral="fast") for n in (8, 32))
    assert small.mars == pytest.approx(large.mars, rel=1e-12)
    assert large.frobenius / small.frobenius == pytest.approx(4, rel=0.1)
    assert large.two_one / small.two_one == pytest.approx(16, rel=0.1)


def test_low_precision_weights_are_measured_in_float64():
    torch.manual_seed(0)
    layer = nn.Linear(1000, 2).bfloat16()
    assert operator_norms(layer, (1000,)).mars == float(layer.weight.detach().double().abs().sum(1).max())


def test_zero_weights():
    layer = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.zeros_(layer.weight)
    for effort in ("best", "fast", "estimate"):
        norms = operator_norms(layer, (2, 4, 4), spectral=effort)
        assert (norms.mars, norms.frobenius, norms.two_one, norms.one, norms.spectral) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("layer", "size", "says"),
    [
        (nn.Conv2d(3, 4, 3), (4, 8, 8), "does not fit Conv2d"),
        (nn.Conv2d(3, 4, 3), (3, 2, 2), "kernel fits into"),
        (nn.Linear(3, 4), (4,), "does not fit Linear"),
        (nn.BatchNorm2d(3), (3, 4, 4), "training mode"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), (3, 4, 4), "no running statistics"),
        (nn.LayerNorm(3), (3,), "LayerNorm is not a layer"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 4, 4), "training mode"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 4, 4), "ReLU cannot be folded"),
    ],
    ids=str,
)
def test_refusals(layer, size, says):
    with pytest.raises(ConfigurationError, match=says):
        operator_norms(layer, size)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ConfigurationError, match=r"must be \(4, 3, 3, 3\)"):
        operator_norms(nn.Conv2d(3, 4, 3), (3, 8, 8), weight=torch.zeros(1))


def test_a_convolution_that_does_more_than_convolve_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return functional.conv2d(x, self.weight - self.weight.mean())

    with pytest.raises(ConfigurationError, match="changes what its base class computes"):
        operator_norms(Standardised(1, 1, 3), (1, 4, 4))


@pytest.mark.parametrize(
    ("base", "arguments", "size"),
    [
        (nn.Linear, (3, 2), (3,)),
        (nn.BatchNorm2d, (3,), (3, 4, 4)),
        (nn.AvgPool2d, (2,), (3, 4, 4)),
        (nn.ConvTranspose2d, (3, 2, 2), (3, 4, 4)),
    ],
)
def test_a_layer_that_computes_more_than_its_base_class_is_refused(base, arguments, size):
    other = type("Other", (base,), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})
    with pytest.raises(ConfigurationError, match="Other changes what its base class computes"):
        operator_norms(other(*arguments).eval(), size)
    same = type("Same", (base,), {})
    assert operator_norms(same(*arguments).eval(), size).mars > 0
