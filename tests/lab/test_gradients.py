import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import tethertune as tt
from tethertune.lab.gradients import gradient_norms
from tethertune.lab.regularisers import Regulariser


class Held(Regulariser):
    """A regulariser with both kinds of penalty, whose gradients are known."""

    def __init__(self, network):
        self.network = network
        self.penalty = tt.Penalty(network, norm="frobenius", strength=0.5)

    def loss(self, images):
        return images.mean() * self.network[0].weight.sum()

    def weight_penalty(self):
        return self.penalty()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))


def test_is_the_norm_of_the_gradient_over_all_images_at_once_in_eval_mode(network):
    images, labels = torch.randn(9, 6), torch.arange(9) % 3
    plain = copy.deepcopy(network).eval()
    cross_entropy(plain(images), labels).backward()
    expected = torch.cat([weight.grad.flatten() for weight in plain.parameters()]).norm()

    network.train()
    parts = gradient_norms(network, Regulariser(), zip(images.split(4), labels.split(4), strict=True), 9)
    assert parts["data_gradient"] == pytest.approx(expected.item(), rel=1e-5)
    assert parts["full_gradient"] == parts["data_gradient"]
    assert parts["penalty_gradient"] == 0
    assert network.training
    assert all(weight.grad is None for weight in network.parameters())


def test_the_parts_are_of_the_data_and_of_both_kinds_of_penalty(network):
    images, labels = torch.randn(8, 6), torch.arange(8) % 3
    held = Held(network)
    with torch.no_grad():
        network[0].weight += 0.1
        network[3].weight -= 0.2
    parts = gradient_norms(network, held, [(images[:4], labels[:4]), (images[4:], labels[4:])], 8)

    network.eval()
    weights = list(network.parameters())
    data = torch.autograd.grad(cross_entropy(network(images), labels), weights)
    penalty = [torch.zeros_like(weight) for weight in weights]
    penalty[0] += images.mean() + 2 * 0.5 * 0.1  # of the maps; then lambda ||T||^2
    penalty[4] -= 2 * 0.5 * 0.2
    total = [ours + theirs for ours, theirs in zip(data, penalty, strict=True)]
    for name, part in (("data_gradient", data), ("penalty_gradient", penalty), ("full_gradient", total)):
        norm = torch.cat([piece.flatten() for piece in part]).norm().item()
        assert parts[name] == pytest.approx(norm, rel=1e-4)


def test_frozen_weights_take_no_part(network):
    for weight in network[:3].parameters():
        weight.requires_grad = False
    images, labels = torch.randn(4, 6), torch.arange(4) % 3
    parts = gradient_norms(network, Regulariser(), [(images, labels)], 4)
    network.eval()
    gradients = torch.autograd.grad(cross_entropy(network(images), labels), list(network[3].parameters()))
    assert parts["full_gradient"] == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
