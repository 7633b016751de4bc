import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tethertune import theory
from tethertune.errors import ConfigurationError, PatternError, ReferenceMismatchError
from tethertune.theory import ClippedCrossEntropy, CrossEntropy, Facts, Layer, Ramp, certificate, certify
from tethertune.theory.frozen import Draws

torch.set_num_threads(1)
OF_THE_SAMPLE = 0.99 * 0.05
"""What of delta is left for the draw of the sample; the rest is for the drawn signs."""


def data(count=40, size=(3, 6, 6), classes=3, batch=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    images = torch.rand(count, *size, generator=generator) + labels.view(-1, *[1] * len(size)) - 1
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def network(bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def moved(model, by=1e-3, only=lambda _: True):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if only(name):
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return other


def kernels(name):
    return name in ("0.weight", "3.weight") or name.startswith("7.")


def test_a_chain_without_biases_is_certified_as_the_formulas_say():
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)
    ).double()
    model = moved(reference, 0.01)
    batches = [(x.double(), y) for x, y in data(size=(5,), batch=7)]
    found = certify(model, batches, reference=reference, head="4", mode="measured", input_bound=2.0)
    images = torch.cat([x for x, _ in batches])
    features = [images, reference[:2](images), reference[:4](images)]
    alphas = [float(x.detach().double().square().mean(0).max().sqrt()) for x in features]
    layers = []
    for i in (0, 2):
        old, new = reference[i].weight.detach().double(), model[i].weight.detach().double()
        distance = float((new - old).abs().sum(1).max())
        layers.append(Layer(float(old.abs().sum(1).max()) + distance, distance))
    head_bound = float(model[4].weight.detach().double().abs().sum(1).max())
    common = {"head_bound": head_bound, "samples": 40, "classes": 3, "lipschitz": math.sqrt(2)}
    closed = certificate.distance(layers, dims=[5, 6, 4], alphas=alphas, **common)
    assert dict(found.distance.parts)["moved"] == pytest.approx(dict(closed.parts)["moved"], abs=1e-9)
    assert dict(found.distance.parts)["frozen"] < dict(closed.parts)["frozen"]
    draws = Draws(3, 4, torch.device("cpu"))
    draws.add(features[2], torch.cat([y for _, y in batches]))
    frozen = head_bound / 40 * math.exp(draws.result().log_bound(0.01 * 0.05))
    assert 10 ** dict(found.distance.parts)["frozen"] == pytest.approx(frozen, rel=1e-9)
    closed = certificate.product(layers, input_dim=5, input_bound=alphas[0], **common)
    assert found.product.value == pytest.approx(closed.value, rel=1e-9)
    shift = certificate.output_shift(layers, input_bound=2.0)
    assert found.perturbation.value == pytest.approx(frozen + 2.0 * head_bound * math.exp(shift), rel=1e-9)
    assert found.gap == pytest.approx(2 * found.complexity.value + certificate.confidence(40, OF_THE_SAMPLE), rel=1e-9)
    assert (found.kind, found.complexity.is_upper_bound, found.price) == ("measurement", None, 0.0)


def test_grid_costs_confidence_and_rounds_up():
    reference = network()
    model = moved(reference)
    free = certify(model, data(), reference=reference, head="7", mode="measured")
    paid = certify(model, data(), reference=reference, head="7")
    assert (paid.kind, paid.mode) == ("certificate", "grid")
    assert paid.paid == ("distances of 2 layers", "bias shifts of 2 layers", "the head's norm", "the head's bias")
    assert paid.price > 0
    assert paid.confidence == pytest.approx(certificate.confidence(40, OF_THE_SAMPLE, price=paid.price))
    assert paid.distance.log10 > free.distance.log10
    for layer in paid.layers:
        assert layer.measured_distance <= layer.distance
    indices = {math.log(layer.distance / layer.reference) / math.log(1.1) for layer in paid.layers}
    assert max(indices) - min(indices) < 1e-9


def test_each_layer_its_own_cell_and_the_better_of_both():
    reference = network()
    model = moved(reference)
    each, both = (certify(model, data(), reference=reference, head="7", sharing=s) for s in ("per-layer", "better"))
    for layer in each.layers:
        assert layer.measured_distance <= layer.distance <= layer.measured_distance * 1.1 * (1 + 1e-9)
    halves = [
        certify(model, data(), reference=reference, head="7", sharing=s, delta=0.025).total
        for s in ("shared", "per-layer")
    ]
    assert both.total == pytest.approx(min(halves), rel=1e-3)  # drawn signs take another part of half of delta


def test_declared_radii_cost_nothing_where_batch_norm_is_frozen():
    reference = network()
    model = moved(reference, only=lambda n: n in ("0.weight", "3.weight", "7.weight"))
    with torch.no_grad():
        model[7].bias.zero_()
    radii = {"0.weight": 0.2, "3.weight": 0.3, "7.weight": 4.0}
    found = certify(
        model,
        data(),
        reference=reference,
        head="7",
        mode="declared",
        radii=radii,
        affine="frozen",
        facts=Facts(declared_before_data=True),
    )
    assert found.paid == ("the head's bias",)
    scale = reference[1].weight / (reference[1].running_var + 1e-5).sqrt()
    assert found.layers[0].distance == pytest.approx(0.2 * float(scale.detach().abs().max()) * (1 + 1e-5), rel=1e-6)
    assert found.layers[1].distance == pytest.approx(0.3 * (1 + 1e-5), rel=1e-12)
    assert found.layers[0].measured_distance < found.layers[0].distance
    assert found.head_bound == pytest.approx(4.0, rel=1e-4)
    assert 0 < found.head_bias < 1e-5  # the smallest cell of the grid
    assert {check.name: check.status for check in found.checks}[
        "the radii were fixed before the data, or paid for"
    ] == ("pass")


@pytest.mark.parametrize(("mode", "paid"), [("declared", ()), ("grid", ("distances of 2 layers", "the head's norm"))])
def test_a_heads_bias_that_was_held_at_zero_is_free(mode, paid):
    reference = network()
    model = moved(reference, only=lambda n: n in ("0.weight", "3.weight", "7.weight"))
    with torch.no_grad():
        model[7].bias.zero_()
    radii = {"0.weight": 0.2, "3.weight": 0.3, "7.weight": 4.0, "7.bias": 0.0}
    found = certify(model, data(), reference=reference, head="7", mode=mode, radii=radii, affine="frozen")
    assert found.paid == paid
    assert found.head_bias == 0
    if mode == "declared":
        assert (found.price, found.confidence) == (0, certificate.confidence(40, OF_THE_SAMPLE))


def test_a_declared_bias_of_the_head_adds_a_weight_on_the_constant_one():
    reference = network()
    model = moved(reference, only=lambda n: n in ("0.weight", "3.weight", "7.weight"))
    radii = {"0.weight": 0.2, "3.weight": 0.3, "7.weight": 4.0}
    common = {"reference": reference, "head": "7", "mode": "declared", "affine": "frozen"}
    found = certify(model, data(), radii=radii | {"7.bias": 2.0}, **common)
    zeroed = copy.deepcopy(model)
    nn.init.zeros_(zeroed[7].bias)
    without = certify(zeroed, data(), radii=radii | {"7.bias": 0.0}, **common)
    counts = torch.cat([labels for _, labels in data()]).bincount().double()
    added = 2 / 40 * (3 * math.sqrt(40) + float(counts.sqrt().sum())) * (1 + 1e-5)
    parts = [10 ** dict(each.distance.parts)["frozen"] for each in (found, without)]
    assert found.paid == ()
    assert parts[0] - parts[1] == pytest.approx(added, rel=1e-5)
    assert found.head_bias == pytest.approx(2.0, rel=1e-4)
    with pytest.raises(ConfigurationError, match=r"7\.bias is at mars distance .* outside of its declared radius"):
        certify(model, data(), radii=radii | {"7.bias": 1e-3}, **common)


def test_what_is_free_is_paid_for_in_declared_mode():
    reference = network()
    model = moved(reference)
    radii = {"0.weight": 0.2, "3.weight": 0.3, "7.weight": 4.0}
    found = certify(model, data(), reference=reference, head="7", mode="declared", radii=radii)
    assert found.paid == ("distances of 1 layers", "bias shifts of 2 layers", "the head's bias")
    assert found.layers[1].distance == pytest.approx(0.3, rel=1e-4)


def test_a_frobenius_radius_bounds_every_row():
    reference = network(bias=False)
    model = moved(reference, only=kernels)
    size = float((model[3].weight - reference[3].weight).detach().norm())
    radii = {"0.weight": 1.0, "3.weight": size, "7.weight": 4.0}
    found = certify(
        model, data(), reference=reference, head="7", mode="declared", radii=radii, norm="frobenius", affine="frozen"
    )
    assert found.layers[1].distance == pytest.approx(size * math.sqrt(36), rel=1e-4)
    assert found.layers[1].measured_distance <= found.layers[1].distance


def test_layers_frozen_by_declaration_are_free():
    reference = network()
    model = moved(reference, only=lambda n: n.startswith(("3.", "7.")))
    found = certify(model, data(), reference=reference, head="7", frozen=["0", "1"])
    assert found.layers[0].distance == 0
    assert found.paid == ("distances of 1 layers", "bias shifts of 1 layers", "the head's norm", "the head's bias")
    everything = certify(reference, data(), reference=reference, head="7", frozen=["0", "1", "3"])
    assert dict(everything.distance.parts)["moved"] == -math.inf
    assert everything.comparison[0].value == 0
    assert everything.comparison[0].is_upper_bound is None


def test_layers_are_ranked_by_what_they_do_to_the_bounds():
    reference = network()
    model = moved(reference)
    found = certify(model, data(), reference=reference, head="7", mode="measured")
    assert [layer.name for layer in found.layers] == ["0", "3"]
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    for layer in found.layers:
        assert layer.product_elasticity == pytest.approx(layer.distance / layer.bound, rel=0.5)
        assert 0 < layer.distance_elasticity < 2
        assert layer.frozen_log10 <= found.distance.log10
    last = found.layers[-1]
    assert last.suffix_log10 == pytest.approx(dict(found.distance.parts)["frozen"], abs=1e-12)


def test_the_printed_elasticity_is_the_derivative():
    balls = [(2.0, 0.1), (3.0, 0.5)]

    def value(first):
        layers = [Layer(b + d, d) for b, d in ((2.0, first), balls[1])]
        common = {"head_bound": 1, "samples": 10, "classes": 2, "input_dim": 4, "input_bound": 1}
        return theory.printed.theorem2(layers, **common).log10

    slope = (value(0.1 * 1.0001) - value(0.1 / 1.0001)) / (2 * math.log10(1.0001))
    ratio = [d / (b + d) for b, d in balls]
    share = ratio[0] / sum(ratio)
    assert slope == pytest.approx(share * (1 - ratio[0]) + ratio[0], rel=1e-6)


def test_comparison_shows_every_bound_side_by_side():
    reference = network()
    found = certify(moved(reference), data(), reference=reference, head="7", input_bound=3.0)
    names = [bound.name for bound in found.comparison]
    assert names[:4] == [
        "Theorem 2 (as printed)",
        "Theorem 3 (as printed)",
        "Eq. 6, Bartlett et al. (as printed)",
        "Eq. 7, Long and Sedghi (as printed)",
    ]
    assert names[4:] == ["product bound", "distance bound", "perturbation bound"]
    assert {bound.kind for bound in found.comparison[:4]} == {"printed"}


def test_losses_and_margins():
    reference = network()
    model = moved(reference)
    clipped = certify(model, data(), reference=reference, head="7", loss=ClippedCrossEntropy())
    assert clipped.bounds_error
    assert clipped.empirical_loss >= clipped.empirical_error
    fixed, best = (certify(model, data(), reference=reference, head="7", loss=Ramp(g)) for g in (1.0, None))
    assert best.paid[-1] == "the margin"
    assert best.total < fixed.total
    whole = certify(model, data(), reference=reference, head="7", loss=CrossEntropy(50.0))
    assert whole.loss_range == pytest.approx(100, abs=2)
    assert not whole.bounds_error


def test_a_small_suffix_on_many_examples_is_not_vacuous():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for index in (0, 2):
        nn.init.eye_(reference[index].weight)
        nn.init.zeros_(reference[index].bias)
    nn.init.zeros_(reference[4].bias)
    with torch.no_grad():
        reference[4].weight.copy_(torch.tensor([[1.0, -1.0, 0, 0], [-1.0, 1.0, 0, 0]]))
    model = moved(reference, 1e-4, only=lambda n: n == "2.weight")
    count = 40_000
    labels = torch.arange(count) % 2
    images = nn.functional.one_hot(labels, 2).float() + 0.1 * torch.rand(count, 2)
    found = certify(
        model,
        [(images, labels)],
        reference=reference,
        head="4",
        mode="declared",
        radii={"0.weight": 0.0, "2.weight": 2e-3, "4.weight": 2.0},
        affine="frozen",
        frozen=["0"],
    )
    assert not found.vacuous
    assert found.empirical_error == 0
    assert found.total < 0.2


def test_vacuous_is_what_promises_nothing():
    reference = network()
    found = certify(moved(reference), data(), reference=reference, head="7")
    assert found.gap >= found.loss_range
    assert found.vacuous
    half = replace(found, gap_log10=math.log10(0.5))
    assert not replace(half, empirical_loss=0.49).vacuous
    assert replace(half, empirical_loss=0.5).vacuous
    assert replace(half, empirical_loss=0.5).as_dict()["vacuous"] is True
    assert replace(found, gap_log10=400.0).vacuous
    whole = replace(half, empirical_loss=0.5, loss_range=2.0)
    assert not whole.vacuous


def test_everything_is_plain_json():
    reference = network()
    found = certify(moved(reference), data(), reference=reference, head="7", frozen=[])
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["total"] == found.total
    assert plain["layers"][0]["name"] == "0"
    assert {check["status"] for check in plain["checks"]} <= {"pass", "fail", "unknown"}
    frozen = certify(reference, data(), reference=reference, head="7", frozen=["0", "1", "3"]).as_dict()
    assert frozen["distance"]["parts"][1] == ["moved", None]


def test_the_checklist_says_what_is_known():
    reference = network()
    batches = data()
    facts = Facts(independent_reference=True, same_data=False)
    found = certify(moved(reference), [*batches, batches[0]], reference=reference, head="7", facts=facts)
    status = {check.name: check for check in found.checks}
    assert status["the reference is independent of the training sample"].status == "pass"
    assert status["these are the examples that the network was trained on"].status == "fail"
    assert status["test images are preprocessed as these were"].status == "unknown"
    assert "16 of 56 images repeat" in status["the examples are independent, and each counts once"].detail
    measured = certify(moved(reference), batches, reference=reference, head="7", mode="measured")
    assert [check.status for check in measured.checks if check.name.startswith("the radii")] == ["fail"]


def test_batches_of_any_size_give_the_same_numbers():
    reference = network()
    model = moved(reference)
    values = [certify(model, data(batch=batch), reference=reference, head="7").gap_log10 for batch in (1, 7, 16, 40)]
    assert values == pytest.approx([values[0]] * 4, abs=1e-6)


def test_samples_needed_scale_with_the_square():
    reference = network()
    found = certify(moved(reference), data(), reference=reference, head="7")
    m = 10**found.samples_needed_log10
    assert 2 * found.complexity.value * math.sqrt(found.samples / m) == pytest.approx(0.5, rel=1e-9)


def outside(**changes):
    reference = network()
    options = {"reference": reference, "head": "7", **changes}
    model = options.pop("model", None) or moved(reference)
    return certify(model, options.pop("batches", data()), **options)


def without(name):
    state = {k: v.detach() for k, v in network().state_dict().items()}
    state.pop(name)
    return state


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"delta": 1.5}, ConfigurationError, "delta=1.5"),
        ({"batches": []}, ConfigurationError, "no training examples"),
        ({"head": "3"}, ConfigurationError, "is not the linear map that makes the logits"),
        ({"reference": without("0.weight")}, ReferenceMismatchError, "has no 0.weight"),
        ({"reference": without("0.weight") | {"0.weight": torch.ones(1)}}, ReferenceMismatchError, "another network"),
        ({"input_bound": 0.1}, ConfigurationError, "it is no bound"),
        ({"frozen": ["nothing"]}, PatternError, "matches no layer"),
        ({"frozen": ["3"]}, ConfigurationError, "declared frozen"),
        ({"affine": "frozen"}, ConfigurationError, "bias or batch norm has moved"),
        ({"mode": "declared", "radii": {"3.wieght": 1.0}}, PatternError, "Did you mean '3.weight'"),
        ({"mode": "declared", "radii": {"3.weight": 1e-9}}, ConfigurationError, "outside of its declared radius"),
        ({"mode": "declared", "radii": {"3.weight": -1.0}}, ConfigurationError, "must be 0 or more"),
        ({"mode": "declared", "radii": {"0.weight": -1.0}}, ConfigurationError, "must be 0 or more"),
        ({"mode": "declared", "radii": {"0.weight": math.nan}}, ConfigurationError, "must be 0 or more"),
        ({"mode": "declared", "radii": {"7.bias": -1.0}}, ConfigurationError, "must be 0 or more"),
        ({"mode": "declared", "radii": {"0.bias": 1.0}}, PatternError, "nor the head's bias"),
        ({"mode": "decalred"}, ConfigurationError, "mode='decalred' is not known.* Did you mean 'declared'"),
        ({"sharing": "per layer"}, ConfigurationError, "sharing='per layer' is not known"),
        ({"norm": "l1"}, ConfigurationError, "norm='l1' is not known"),
        ({"affine": "fixed"}, ConfigurationError, "affine='fixed' is not known"),
        ({"mode": "declared", "radii": {"7.weight": 0.0}}, ConfigurationError, "must be above 0"),
        ({"mode": "declared", "radii": {"7.weight": 1e-3}}, ConfigurationError, "outside of its declared radius"),
        ({"batches": data(classes=9)}, ConfigurationError, "3 logits"),
        ({"batches": [(torch.zeros(4, 3, 6, 6), torch.zeros(3).long())]}, ConfigurationError, "4 images and 3 labels"),
        ({"model": network().train()}, ConfigurationError, "training mode"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(changes, error, says):
    with pytest.raises(error, match=says):
        outside(**changes)


def test_weights_that_are_not_finite_are_refused():
    reference = network()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ConfigurationError, match="not finite"):
        certify(model, data(), reference=reference, head="7")
