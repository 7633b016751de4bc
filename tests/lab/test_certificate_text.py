"""What the terminal shows of a certificate, from certificates of small networks."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tethertune import theory
from tethertune.lab.certificate_text import show
from tethertune.lab.certify import Finding
from tethertune.theory import Ramp, certify

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def certificate():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model[0].weight.add_(0.01)
        model[2].weight.add_(0.02)
    batches = [(torch.rand(30, 4), torch.arange(30) % 3)]
    return certify(model, batches, reference=reference, head="4", loss=Ramp(None), input_bound=1.0)


def shown(capsys, certificate, **options):
    show(Finding("runs/a", "lite0", "photos (30 training images)", certificate, **options))
    return capsys.readouterr().out


def test_all_that_was_found_is_said(capsys, certificate):
    text = shown(capsys, certificate)
    assert text.startswith(
        "runs/a\nfrom lite0\non photos (30 training images)\n\nCertificate, grid mode, fails with prob"
    )
    assert "30 training images, 3 classes" in text
    assert f"empirical loss   {certificate.empirical_loss:.4f}" in text
    assert f"confidence term  {certificate.confidence:.4f}, {certificate.price:.1f} nats of it for" in text
    assert text.count("VACUOUS: the gap alone") == 1
    assert "2 of the body's 2 linear maps may move." in text
    for bound in certificate.comparison:
        assert f"{bound.name} " in text
    for check in certificate.checks:
        assert check.name in text
    assert text.count("as printed, not a valid bound") == 4


def test_layers_are_ranked_by_what_they_do_to_the_bound(capsys, certificate):
    text = shown(capsys, certificate)
    shrink, freeze = text.index("Radii to shrink first"), text.index("Layers to freeze first")
    first, second = certificate.layers
    order = sorted((first, second), key=lambda layer: -layer.distance_elasticity)
    rows = [line.split()[0] for line in text[shrink:freeze].splitlines()[2:4]]
    assert rows == [layer.name for layer in order]


@pytest.mark.parametrize(
    ("gap", "loss", "verdict"),
    [
        (0.2, 0.3, "\nNOT VACUOUS.\n"),
        (0.7, 0.4, "VACUOUS: the gap is below the range of the loss, but with the empirical loss it reaches it."),
        (1.0, 0.0, "VACUOUS: the gap alone reaches the range of the loss."),
    ],
)
def test_the_verdict_says_why(capsys, certificate, gap, loss, verdict):
    assert verdict in shown(capsys, replace(certificate, gap_log10=math.log10(gap), empirical_loss=loss))


@pytest.mark.parametrize(
    ("log10", "words"), [(68.1, "gap              10^68.1"), (400.0, "expected loss <= more than 10^300")]
)
def test_numbers_that_are_too_long_are_powers_of_ten(capsys, certificate, log10, words):
    assert words in shown(capsys, replace(certificate, gap_log10=log10))


def test_a_body_that_may_not_move_has_no_rankings(capsys, certificate):
    still = tuple(replace(layer, distance=0.0) for layer in certificate.layers)
    frozen = replace(certificate.distance, parts=(("frozen", -1.0), ("moved", -math.inf)), log10=-1.0)
    product = replace(certificate.product, log10=3.0)
    text = shown(capsys, replace(certificate, layers=still, distance=frozen, product=product, price=0.0, paid=()))
    assert "0 of the body's 2 linear maps may move." in text
    assert "Radii to shrink first" not in text
    assert "(distance bound: frozen features 0.1000, moved 0)" in text
    assert "nats of it" not in text


def test_networks_without_a_certificate_get_measurements(capsys):
    reference = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    measured = theory.measurements(reference, reference=reference, head="2")
    refusal = "1 is not covered by any proven bound: LayerNorm."
    text = shown(capsys, None, refusal=refusal, measurements=measured)
    assert f"No certificate: {refusal}\nMeasurements of its layers, which guarantee nothing:" in text
    assert "0.weight" in text
