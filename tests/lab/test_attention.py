import torch
from torch import nn

from tethertune.lab.attention import importance


def test_the_channel_that_tells_the_classes_apart_matters_most():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.rand(40, 3, 4, 4, generator=generator)
    images[:, 1] += 3 * labels[:, None, None]
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 2)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    examples = [(images[:25], labels[:25]), (images[25:], labels[25:])]
    losses = importance(network, ["0"], examples, classes=2)["0"]
    assert losses.shape == (3,)
    assert losses.argmax() == 1
    assert losses[1] > 10 * losses[[0, 2]].abs().max()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(importance(network, ["0"], examples, classes=2)["0"], losses)  # nothing is random


def test_tokens_and_vectors_are_features_too():
    tokens = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Linear(4, 6), nn.AdaptiveAvgPool2d((1, 6)), nn.Flatten())
    losses = importance(network, ["0", "2"], [(tokens, torch.arange(12) % 3)], classes=3)
    assert torch.allclose(losses["0"], losses["2"], atol=1e-6)  # the mean over tokens is what the pooling gives
