import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tethertune.errors import ConfigurationError, PatternError
from tethertune.lab.training import Training, finetune

BELOW = ("conv_stem", "bn1", "blocks.[01]*")


@pytest.mark.parametrize("method", ["mars-pgm", "l2-pgm"])
@pytest.mark.parametrize("radius", [{"radius": 0.5}, {"relative_radius": 0.1}, {"radius": math.inf}], ids=str)
def test_freezing_holds_layers_with_all_they_have_and_no_others(tiny, tiny_inputs, method, radius):
    before = load_file(tiny_inputs / "base.safetensors")
    run = finetune(tiny(method=method, freeze=BELOW, head_radius=None, **radius), quiet=True)
    after = load_file(run.path / "model.safetensors")
    below = [name for name in before if name.startswith(("conv_stem.", "bn1.", "blocks.0", "blocks.1"))]
    above = [name for name in before if name not in below and not name.startswith("classifier.")]
    assert any("bn" in name for name in below)
    assert all(torch.equal(after[name], before[name]) for name in below)
    trained = [name for name in above if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(not torch.equal(after[name], before[name]) for name in trained)


def test_what_is_frozen_needs_no_gradient_and_the_rest_keeps_its_radius(tiny):
    training = Training(tiny(freeze=BELOW, radius=0.5), Accelerator(cpu=True))
    needless = {name for name, p in training.network.named_parameters() if not p.requires_grad}
    assert needless == {
        name
        for name, _ in training.network.named_parameters()
        if name.startswith(("conv_stem.", "bn1.", "blocks.0", "blocks.1"))
    }
    balls = training.regulariser.constraint.distances()
    assert {ball.radius for name, ball in balls.items() if name in needless} == {0.0}
    assert {ball.radius for name, ball in balls.items() if name not in needless and ball.role == "body"} == {0.5}


def test_everything_frozen_is_a_radius_of_0_with_affine_frozen(tiny, tiny_inputs):
    before = load_file(tiny_inputs / "base.safetensors")
    runs = [
        finetune(tiny(**options), quiet=True) for options in ({"freeze": ("*",)}, {"radius": 0.0, "affine": "frozen"})
    ]
    first, second = (load_file(run.path / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], before[name]) for name in before if not name.startswith("classifier."))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"freeze": ("layer9",)}, PatternError, "freeze='layer9' matches no parameter"),
        ({"freeze": ("classifier",)}, PatternError, "freeze='classifier' matches no parameter"),
        ({"freeze": BELOW, "exclude": ("bn1",)}, ConfigurationError, r"bn1\.bias is both in --freeze and in --exclude"),
        ({"freeze": BELOW, "method": "none"}, ConfigurationError, "--freeze .* goes with --method l2-pgm, mars-pgm"),
    ],
    ids=str,
)
def test_what_cannot_be_frozen_is_told_before_any_work(tiny, options, error, told):
    with pytest.raises(error, match=told):
        finetune(tiny(**options), quiet=True)
