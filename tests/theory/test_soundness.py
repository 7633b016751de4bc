"""Lower bounds of the complexity, found by searching the class, never exceed what is certified, node by node.

For each draw of signs the supremum over the class is searched by Frank-Wolfe steps to the vertices of its balls, which
gives networks of the class; the mean over draws of what they reach is a lower bound up to the noise of the draws.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tethertune.theory import ClippedCrossEntropy, Ramp
from tethertune.theory.case import Case
from tethertune.theory.classes import NetworkClass, measure
from tethertune.theory.graph import trace
from tethertune.theory.propagation import Ball, Distance, Perturbation, Product, walk
from tethertune.theory.sample import observe, tensors

torch.set_num_threads(1)
SAMPLES, DRAWS, STEPS = 24, 24, 4


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.third = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = self.second(torch.relu(self.norm(self.first(x))))
        z = torch.relu(x + y)
        return torch.cat((z, self.third(x)), 1)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def leaky():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.LeakyReLU(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2))


def shifted():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Softplus(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2))


def pooled():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def residual():
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), Residual(3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


def normalised_first():
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
    )


def placed():
    return nn.Sequential(
        nn.Flatten(2), nn.Linear(16, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 4), nn.Hardswish(),
        nn.Linear(4, 2),
    )  # fmt: skip


def prepare(make, seed):
    torch.manual_seed(seed)
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    images = torch.randn(SAMPLES, 3, 4, 4, dtype=torch.float64)
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    network = trace(model, images, head=head)
    state = tensors(model)
    sample = observe(network, model, state, [(images, torch.zeros(SAMPLES, dtype=torch.long))])
    return model, head, network, state, sample, images


def corners(network, state, balls, gradient):
    """The vertex of every ball that a gradient points to: weights that stay exactly in the class."""
    chosen = {}
    for index, node in network.linears.items():
        ball, scale = balls[index], node.scale(state)
        if node.weight is not None:
            chosen[node.weight] = state[node.weight] + _row_vertices(node, gradient[node.weight], ball, scale)
        if node.bias is not None and ball.shift:
            factor = 1 if scale is None else 1 / scale.abs()
            chosen[node.bias] = state[node.bias] + ball.shift * factor * gradient[node.bias].sign()
        elif node.norm is not None and node.norm.bias is not None and ball.shift:
            chosen[node.norm.bias] = state[node.norm.bias] + ball.shift * gradient[node.norm.bias].sign()
    return chosen


def _row_vertices(node, gradient, ball, scale):
    transposed = getattr(node.geometry, "transposed", False)
    rows = (gradient.transpose(0, 1) if transposed else gradient).flatten(1)
    best = rows.abs().argmax(1, keepdim=True)
    length = torch.full((len(rows), 1), ball.distance, dtype=torch.float64)
    if scale is not None:
        length = length / scale.abs().unsqueeze(1)
    vertex = torch.zeros_like(rows).scatter(1, best, rows.gather(1, best).sign() * length)
    if transposed:
        first, second = gradient.shape[:2]
        return vertex.view(second, first, *gradient.shape[2:]).transpose(0, 1)
    return vertex.view_as(gradient)


def searched(model, head, network, state, balls, *, images, frozen, generator):
    """Mean over draws of signs of the largest sup norm that the search finds."""
    body = copy.deepcopy(model)
    features = {}
    body.get_submodule(head).register_forward_pre_hook(lambda _, inputs: features.update(x=inputs[0]))

    def run(weights):
        functional_call(body, weights, (images,))
        return features["x"] - frozen

    names = [name for node in network.linears.values() for name in node.parameters if "running" not in name]
    reached = []
    for _ in range(DRAWS):
        signs = torch.randint(0, 2, (SAMPLES,), generator=generator).double() * 2 - 1
        best, weights = 0.0, {}
        for _ in range(STEPS):
            current = {name: weights.get(name, state[name]).clone().requires_grad_() for name in names}
            total = (signs[:, None] * run(current)).sum(0)
            best = max(best, float(total.detach().abs().max()))
            top = total.abs().argmax() if weights else torch.randint(len(total), (1,), generator=generator)[0]
            gradients = torch.autograd.grad(total[top] * total[top].sign().add(0.5).sign(), list(current.values()))
            weights = corners(network, state, balls, dict(zip(current, gradients, strict=True)))
        with torch.no_grad():
            best = max(best, float((signs[:, None] * run(weights)).sum(0).abs().max()))
        reached.append(best)
    return sum(reached) / DRAWS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("make", [mlp, leaky, shifted, pooled, residual, normalised_first, placed])
def test_no_network_of_the_class_exceeds_the_bounds(make, seed):
    model, head, network, state, sample, images = prepare(make, seed)
    generator = torch.Generator().manual_seed(seed)
    measured = measure(network, state, state)
    for part, shift in ((0.02, 0.0), (0.5, 0.0), (0.3, 0.1)):
        balls = {}
        for index, found in measured.items():
            node = network.linears[index]
            movable = node.bias is not None or (node.norm is not None and node.norm.bias is not None)
            distance = found.ball.reference * part if node.weight is not None else 0.0
            balls[index] = Ball(found.ball.reference, distance, shift if movable else 0.0, found.ball.bias)
        log_features = {index: sample.log_features[node.call] for index, node in network.linears.items()}
        moved = walk(network, Distance(balls, log_features, SAMPLES))
        whole = walk(network, Product(balls, sample.log_input, SAMPLES))
        furthest = walk(network, Perturbation(balls, sample.input_sup))
        store = {}
        handle = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs, s=store: s.update(x=inputs[0]))
        with torch.no_grad():
            model(images)
        handle.remove()
        frozen = store["x"]
        found = searched(model, head, network, state, balls, images=images, frozen=frozen, generator=generator)
        assert 0 < found <= math.exp(moved.log_expectation)
        assert found <= SAMPLES * math.exp(furthest.log_shift)
        assert float(frozen.abs().max()) <= math.exp(furthest.log_size) * (1 + 1e-12)
        found = searched(model, head, network, state, balls, images=images, frozen=0.0, generator=generator)
        assert 0 < found <= math.exp(whole.log_expectation)


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("loss", [Ramp(0.5), Ramp(3.0), ClippedCrossEntropy()], ids=["ramp", "wide ramp", "clipped ce"])
def test_no_head_of_the_class_exceeds_the_bound(loss, bias):
    """The whole complexity, through the loss: heads in their ball on moved features, with a bias in its interval."""
    model, head, network, state, _, images = prepare(pooled, 0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (SAMPLES,), generator=generator)
    sample = observe(network, model, state, [(images, labels)])
    balls = {
        index: replace(found.ball, distance=0.1 * found.ball.reference, shift=0.0)
        for index, found in measure(network, state, state).items()
    }
    bound = 2.0
    choice = NetworkClass(balls, bound, bias, 0.0, ())
    proven = [
        found.value
        for delta in (None, 1e-6)
        for found in Case(network, sample, sample.input_sup, delta).bounds(choice, loss).all
    ]
    features = {}
    model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: features.update(x=inputs[0]))
    names = [name for node in network.linears.values() for name in node.parameters]

    def value(weights, rows, shift, signs):
        functional_call(model, weights, (images,))
        logits = features["x"] @ rows.T + shift
        own, other = (logits.gather(1, each[:, None]).squeeze(1) for each in (labels, 1 - labels))
        entropies = nn.functional.cross_entropy(logits, labels, reduction="none")
        return (signs * loss.values(SimpleNamespace(margins=own - other, cross_entropies=entropies))).mean()

    reached = []
    for _ in range(DRAWS):
        signs = torch.randint(0, 2, (SAMPLES,), generator=generator).double() * 2 - 1
        best = -math.inf
        for _ in range(20):
            random = {name: torch.randn(state[name].shape, generator=generator, dtype=torch.float64) for name in names}
            rows = torch.randn(2, 4, generator=generator, dtype=torch.float64)
            rows *= bound * torch.rand(1, generator=generator) / rows.abs().sum(1, keepdim=True)
            weights = corners(network, state, balls, random)
            leaves = [tensor.requires_grad_() for tensor in (*weights.values(), rows)]
            found = value(weights, rows, bias * torch.tensor([1.0, -1.0]), signs)
            *gradients, of_rows = torch.autograd.grad(found, leaves)
            weights = corners(network, state, balls, dict(zip(weights, gradients, strict=True)))
            top = of_rows.abs().argmax(1, keepdim=True)
            vertex = torch.zeros_like(rows).scatter(1, top, bound * of_rows.gather(1, top).sign())
            better = [value(weights, vertex, bias * torch.tensor([s, -s]), signs) for s in (1.0, -1.0)]
            best = max(best, *(each.item() for each in (found, *better)))
        reached.append(best)
    assert 0 < sum(reached) / DRAWS <= min(proven)
