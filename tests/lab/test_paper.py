import doctest

import pytest

from tethertune.lab import paper
from tethertune.lab.methods import METHODS

DATA = ("aircraft", "butterfly", "flowers", "pets", "pubfig")


def test_the_tables_are_whole():
    cells = [paper.accuracy(network, method, data) for network in paper.NETWORKS for method in METHODS for data in DATA]

    assert len(cells) == 60
    assert all(0.5 < cell.mean < 0.95 and 0 < cell.deviation < 0.04 for cell in cells)
    assert all(paper.sizes(data)["classes"] >= 37 for data in DATA)


def test_a_figure_is_as_printed():
    printed = paper.accuracy("efficientnet_b0", "mars-pgm", "pets")

    assert (printed.mean, printed.deviation) == pytest.approx((0.9138, 0.0024))
    assert paper.sizes("pets") == {"train": 2000, "validation": 2000, "test": 3390, "classes": 37}


def test_what_the_paper_does_not_print_is_none():
    assert paper.accuracy("resnet101", "none", "dtd") is None
    assert paper.accuracy("resnet50", "none", "pets") is None
    assert paper.accuracy("resnet101", "a later method", "pets") is None
    assert paper.sizes("dtd") is None


@pytest.mark.parametrize(
    ("model", "network"),
    [
        ("resnet101", "resnet101"),
        ("resnet101.tv2_in1k", "resnet101"),
        ("torchvision:resnet101", "resnet101"),
        ("hf-hub:timm/resnet101.a1h_in1k", "resnet101"),
        ("efficientnet_b0", "efficientnet_b0"),
        ("tf_efficientnet_b0.aa_in1k", "efficientnet_b0"),
        ("wide_resnet101_2", None),
        ("tf_efficientnet_b1", None),
        ("lite0", None),
    ],
)
def test_a_network_is_known_whatever_its_tag(model, network):
    assert paper.network(model) == network


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(paper).failed == 0
