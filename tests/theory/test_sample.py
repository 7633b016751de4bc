"""One pass in pieces of any size against everything at once."""

import copy
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tethertune.errors import ConfigurationError
from tethertune.theory.graph import trace
from tethertune.theory.sample import observe, tensors

torch.set_num_threads(1)


def make():
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)
    ).eval()
    reference[1].running_mean.normal_()
    model = copy.deepcopy(reference)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    images = torch.randn(11, 2, 4, 4)
    return model, reference, images, torch.arange(11) % 3


def seen(sizes, traced_with=4):
    model, reference, images, labels = make()
    network = trace(model, images[:traced_with], head="6")
    batches = zip(images.split(sizes), labels.split(sizes), strict=True)
    return network, observe(network, model, tensors(reference), batches)


@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1] * 11, [7, 4]], ids=str)
def test_it_sees_the_reference_features_and_the_trained_logits(sizes):
    model, reference, images, labels = make()
    network, found = seen(sizes)
    inputs = [images, reference[:4](images), reference[:6](images)]
    for node, expected in zip([*network.linears.values(), network.head], inputs, strict=True):
        root = expected.detach().double().square().sum(0).max().sqrt()
        assert found.log_features[node.call] == pytest.approx(math.log(root), abs=1e-6)
    assert found.log_input == pytest.approx(math.log(images.double().square().sum(0).max().sqrt()), abs=1e-12)
    assert (found.size, found.distinct) == (11, 11)
    assert found.input_sup == pytest.approx(float(images.abs().max()))
    assert found.input_norm == pytest.approx(float(images.flatten(1).norm(dim=1).max()), rel=1e-6)
    logits = model(images).detach().double()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    margins = own - logits.scatter(1, labels[:, None], -math.inf).amax(1)
    assert found.scores.margins.tolist() == pytest.approx(margins.tolist(), abs=1e-5)
    assert found.root_counts == pytest.approx(2 + 2 + math.sqrt(3))
    at_once = seen([11])[1].frozen
    assert (found.frozen.mean, found.frozen.massart) == pytest.approx((at_once.mean, at_once.massart), rel=1e-5)
    roots = [float(inputs[2][labels == k].detach().double().square().sum(0).max().sqrt()) for k in range(3)]
    roots.append(3 * float(inputs[2].detach().double().square().sum(0).max().sqrt()))
    assert found.frozen.massart == pytest.approx(math.sqrt(2 * math.log(8)) * sum(roots), rel=1e-5)


def test_a_body_that_has_not_moved_is_run_once_and_gives_the_trained_heads_logits():
    model, reference, images, labels = make()
    head = model[6].weight.detach().clone()
    model.load_state_dict(reference.state_dict())
    model[6].weight.data.copy_(head)
    network = trace(model, images[:4], head="6")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = observe(network, model, tensors(reference), [(images, labels)])
    assert not calls
    logits = model(images).detach().double()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    margins = own - logits.scatter(1, labels[:, None], -math.inf).amax(1)
    assert found.scores.margins.tolist() == pytest.approx(margins.tolist(), abs=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_sample():
    """Nothing small may outlive a batch: in the memory that its images leave, it keeps the next from fitting."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(48, 3)).eval()
    network = trace(model, torch.zeros(16, 3, 128, 128), head="2")
    used = []

    def batches():
        for count in range(60):
            used.append(int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]))
            yield torch.full((16, 3, 128, 128), float(count)), torch.zeros(16, dtype=torch.long)

    observe(network, model, tensors(model), batches())
    assert used[-1] - used[20] < 10 * 16 * 3 * 128 * 128 * 4 / 1024


def test_repeated_images_are_counted_once_wherever_they_are():
    model, reference, images, labels = make()
    network = trace(model, images[:4], head="6")
    again = torch.cat((images, images[2:5]))
    batches = zip(again.split(5), torch.cat((labels, labels[2:5])).split(5), strict=True)
    found = observe(network, model, tensors(reference), batches)
    assert (found.size, found.distinct) == (14, 11)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "no training examples"),
        ([(torch.randn(3, 2, 4, 4), torch.tensor([0, 1]))], "3 images and 2 labels"),
        ([(torch.randn(2, 2, 4, 4), torch.tensor([0, 3]))], "Labels from 0 to 3 given for 3 logits"),
        ([(torch.randn(2, 2, 4, 4), torch.tensor([-1, 0]))], "Labels from -1"),
        ([(torch.full((2, 2, 4, 4), math.inf), torch.tensor([0, 1]))], "are not finite on this sample"),
    ],
)
def test_refusals(batches, says):
    model, reference, images, _ = make()
    network = trace(model, images[:4], head="6")
    with pytest.raises(ConfigurationError, match=says):
        observe(network, model, tensors(reference), batches)


def test_tied_tensors_stand_under_each_of_their_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    found = tensors(model)
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert not found["0.weight"].requires_grad
