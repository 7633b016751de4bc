import copy
import json
import math

import pytest
import torch
from torch import nn

from tethertune import theory
from tethertune.errors import ConfigurationError
from tethertune.lab import growth
from tethertune.lab.training import finetune
from tethertune.theory import NotCoveredError, Ramp

torch.set_num_threads(1)
LARGE = (96, 128, 192)
"""Resolutions at which the smallest map of a ResNet-18, 1/32 of the side, holds its 3 x 3 kernels."""
THEOREM_2, EQUATION_7 = "Theorem 2 (as printed)", "Eq. 7, Long and Sedghi (as printed)"


@pytest.fixture(scope="module")
def found():
    return growth.measure(
        samples=2,
        depths=("resnet18", "resnet34"),
        widths=(0.125, 0.25),
        resolutions=(32, *LARGE),
        distances=(1e-4, 1e-3, 0.02, 1.0),
    )


def values(found, sweep, what, name):
    return [getattr(point, what)[name] for point in found.sweep(sweep)]


def test_the_mars_norm_is_constant_in_the_resolution(found):
    assert values(found, "resolution", "norms", "mars")[1:] == pytest.approx(
        values(found, "resolution", "norms", "kernel_mars")[1:], abs=1e-12
    )
    kernels = values(found, "resolution", "norms", "kernel_mars")
    assert kernels == pytest.approx([kernels[0]] * 4, abs=1e-12)
    assert values(found, "resolution", "norms", "mars")[0] < kernels[0]  # its maps are smaller than its kernels


def test_the_frobenius_and_the_2_1_norm_grow_with_the_resolution(found):
    frobenius, two_one = (values(found, "resolution", "norms", name) for name in ("frobenius", "two_one"))
    assert frobenius == sorted(frobenius)
    assert two_one == sorted(two_one)
    for small, large in ((1, 2), (2, 3)):
        side = math.log10(LARGE[large - 1] / LARGE[small - 1])
        assert frobenius[large] - frobenius[small] == pytest.approx(side, rel=0.15)
        assert two_one[large] - two_one[small] == pytest.approx(2 * side, rel=0.15)


def test_so_do_the_bounds_that_are_made_of_them(found):
    change = {
        name: found.sweep("resolution")[3].bounds[name] - found.sweep("resolution")[1].bounds[name]
        for name in found.points[0].bounds
    }
    assert abs(change[THEOREM_2]) < 0.1
    assert abs(change["product bound"]) < 0.1
    assert change["Theorem 3 (as printed)"] > 19 * math.log10(2)  # 20 layers, twice the side
    assert change["Eq. 6, Bartlett et al. (as printed)"] > change[EQUATION_7] > 0


def test_every_bound_grows_with_depth_and_the_printed_ones_by_2_to_the_depth_more(found):
    shallow, deep = found.sweep("depth")
    assert (shallow.layers, deep.layers) == (shallow.x, deep.x) == (20, 36)
    grown = {name: deep.bounds[name] - shallow.bounds[name] for name in deep.bounds}
    assert all(change > 5 for change in grown.values())
    assert grown[THEOREM_2] - grown["product bound"] == pytest.approx(16 * math.log10(2), abs=0.5)


def test_every_norm_but_the_spectral_one_grows_with_width(found):
    narrow, wide = found.sweep("width")
    assert narrow.layers == wide.layers
    assert wide.parameters > 3 * narrow.parameters
    for name in ("mars", "frobenius", "two_one"):
        assert wide.norms[name] - narrow.norms[name] > 0.1
    assert abs(wide.norms["spectral"] - narrow.norms["spectral"]) < 0.05


def test_every_bound_grows_with_the_distance(found):
    for name in found.points[0].bounds:
        grown = values(found, "distance", "bounds", name)
        assert grown == sorted(grown)
    for name in (THEOREM_2, EQUATION_7):  # in proportion to small distances
        first, second, *_ = values(found, "distance", "bounds", name)
        assert second - first == pytest.approx(1, abs=0.02)


def test_these_are_the_numbers_of_certify(found):
    """A network all of whose layers are larger by the part that they may move by, and whose head has norm 1."""
    loaded = growth._Random(0).network("resnet18")
    reference = loaded.model.double().eval()
    with torch.no_grad():
        reference.fc.weight.zero_()[:, 0] = 1
        reference.fc.bias.zero_()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= 1.02
    images, labels = growth._sample(loaded, 128, 2)
    certified = theory.certify(
        model, [(images.double(), labels)], reference=reference, head="fc", loss=Ramp(math.sqrt(2)), mode="measured"
    )
    point = next(point for point in found.sweep("distance") if point.x == 0.02)
    for bound in certified.comparison:
        if bound.name == "Theorem 3 (as printed)":
            continue  # this head has Frobenius norm sqrt(10)
        doubled = math.log10(2) if bound.about == "complexity" else 0
        assert point.bounds[bound.name] == pytest.approx(bound.log10 + doubled, abs=1e-3)
    assert point.proven == ("product bound", "distance bound")


def test_the_same_seed_gives_the_same_numbers_and_is_plain_json(found):
    few = {"samples": 2, "depths": (), "widths": (0.125,), "resolutions": (), "distances": ()}
    assert growth.measure(**few).points[0] == found.sweep("width")[0]
    assert growth.measure(**few, seed=1).points[0].norms != found.sweep("width")[0].norms
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (plain["schema"], plain["model"], plain["weights"], plain["seed"]) == (1, "resnet18", "random", 0)
    assert len(plain["points"]) == 12


def test_a_network_of_the_users(tiny, tmp_path):
    from safetensors.torch import save_file

    from tethertune.lab import models

    few = {"samples": 2, "depths": (), "widths": (), "resolutions": (64, 96), "distances": (0.1,)}
    save_file(models.load("test_resnet", classes=2, size=32, pretrained=False).model.state_dict(), tmp_path / "resnet")
    options = {"model": "test_resnet", "weights": str(tmp_path / "resnet"), "epochs": 1, "method": "none"}
    run = finetune(tiny(**options), quiet=True)
    found = growth.measure(str(run.path), **few)
    assert (found.model, found.weights) == ("test_resnet", str(run.path))
    assert [point.sweep for point in found.points] == ["resolution", "resolution", "distance"]
    with pytest.raises(NotCoveredError, match="squeeze-and-excitation"):
        growth.measure(str(finetune(tiny(epochs=1), quiet=True).path), **few)
    with pytest.raises(ConfigurationError, match="neither a known network"):
        growth.measure("resnet19", **few)
