"""timm's and torchvision's networks, unmodified. One file, because importing timm takes seconds."""

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from timm.layers import AvgPool2dSame, BatchNormAct2d, Conv2dSame

from tethertune import theory
from tethertune.theory import NotCoveredError, certify, measurements, operator_norms
from tethertune.theory.graph import trace
from tethertune.theory.nodes import MaxPool
from tethertune.theory.sample import tensors

torch.set_num_threads(2)


def sample(size, count=4, classes=10):
    torch.manual_seed(0)
    return [(torch.rand(count, 3, size, size) * 2 - 1, torch.randint(classes, (count,)))]


def tuned(reference, part=0.02):
    """Every weight of a linear map larger by the same part, so that each distance is that part of its norm."""
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1 + part)
    return model


def scramble(model):
    """Batch norms with statistics and scales as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "head", "size", "maps"),
    [
        (lambda: timm.create_model("resnet10t", num_classes=10), "fc", 64, 14),
        (lambda: timm.create_model("resnet18", num_classes=10), "fc", 64, 20),
        (lambda: timm.create_model("resnet50", num_classes=10), "fc", 64, 53),
        (lambda: torchvision.models.resnet18(num_classes=10), "fc", 64, 20),
        (lambda: torchvision.models.vgg11_bn(num_classes=10), "classifier.6", 32, 10),
        (lambda: timm.create_model("efficientnet_lite0", num_classes=10), "classifier", 64, 49),
        (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10), "classifier", 65, 49),
        (lambda: torchvision.models.mobilenet_v2(num_classes=10), "classifier.1", 64, 52),
        (lambda: timm.create_model("densenet121", num_classes=10), "classifier", 64, None),
        (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), "fc", 64, 56),
    ],
    ids=[
        "resnet10t",
        "resnet18",
        "resnet50",
        "torchvision resnet18",
        "vgg11_bn",
        "lite0",
        "tf_lite0",
        "mobilenet_v2",
        "densenet121",
        "shufflenet_v2",
    ],
)
def test_networks_that_are_covered(make, head, size, maps):
    reference = scramble(make())
    found = certify(tuned(reference), sample(size), reference=reference, head=head, mode="measured", input_bound=1.0)
    assert maps is None or len(found.layers) == maps
    # Where a batch norm stands alone, its distance is 0: only weights were changed.
    for layer in found.layers:
        assert layer.distance == pytest.approx(0.02 * layer.reference, rel=1e-3, abs=1e-12) or layer.distance == 0
    assert found.distance.log10 < found.comparison[0].log10
    assert found.perturbation.log10 > 0
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "head", "node"),
    [
        ("efficientnet_b0", "classifier", r"blocks\.0\.0\.se .*squeeze-and-excitation"),
        ("mobilenetv3_small_050", "classifier", "squeeze-and-excitation"),
        ("vit_tiny_patch16_224", "head", r"blocks\.0\.norm1 .*LayerNorm|different shapes|not a feature"),
        ("convnext_atto", "head.fc", "LayerNorm"),
    ],
)
def test_networks_that_are_measured_only(name, head, node):
    options = {"img_size": 64} if name.startswith("vit") else {}
    reference = timm.create_model(name, num_classes=10, **options).eval()
    with pytest.raises(NotCoveredError, match=node):
        certify(tuned(reference), sample(64), reference=reference, head=head)
    found = measurements(tuned(reference), reference=reference, head=head)
    assert len(found) > 10
    assert sum(layer.share for layer in found) == pytest.approx(1)


def test_folded_maps_give_the_networks_own_features():
    """The frozen features that are streamed are those of the reference network."""
    reference = scramble(timm.create_model("tf_efficientnet_lite0", num_classes=10))
    batches = sample(65, count=3)
    network = trace(reference, batches[0][0], head="classifier")
    observed = theory.sample.observe(network, reference, tensors(reference), batches)
    with torch.no_grad():
        features = reference.forward_head(reference.forward_features(batches[0][0]), pre_logits=True)
    expected = features.double().square().sum(0).max().sqrt()
    assert observed.log_features[network.head.call] == pytest.approx(float(expected.log()), abs=1e-5)


def test_same_padding_is_part_of_the_convolution():
    torch.manual_seed(0)
    for size in (7, 8):
        layer = Conv2dSame(3, 4, 3, stride=2, bias=False).double()
        basis = torch.eye(3 * size * size, dtype=torch.float64).view(-1, 3, size, size)
        matrix = layer(basis).flatten(1).T.detach()
        norms = operator_norms(layer, (3, size, size))
        assert norms.mars == pytest.approx(float(matrix.abs().sum(1).max()), rel=1e-12)
        assert norms.frobenius == pytest.approx(float(matrix.norm()), rel=1e-12)
        assert norms.two_one == pytest.approx(float(matrix.norm(dim=1).sum()), rel=1e-12)
        assert norms.spectral == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-9)
        pool = AvgPool2dSame(3, 2)
        matrix = pool(basis).flatten(1).T
        norms = operator_norms(pool, (3, size, size))
        assert norms.frobenius == pytest.approx(float(matrix.norm()), rel=1e-12)
        assert norms.one == pytest.approx(float(matrix.abs().sum(0).max()), rel=1e-12)


def test_batch_norm_with_an_activation_is_its_scale():
    norm = scramble(BatchNormAct2d(4))
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    assert operator_norms(norm, (4, 5, 5)).mars == pytest.approx(float(scale.abs().max()), rel=1e-12)


def test_max_pooling_costs_its_window():
    network = trace(torchvision.models.resnet18().eval(), torch.zeros(2, 3, 64, 64), head="fc")
    assert [node.window for node in network.nodes if isinstance(node, MaxPool)] == [9]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_resnet101_in_a_minute_and_four_gigabytes():
    """In a process of its own, so that the peak of memory is its own."""
    # Threads that wait for their turn on a busy machine must not count as time of the processor.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", RESNET101], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 104
    assert found["gap_log10"] > 50
    assert found["seconds"] < 60  # of the processor, all threads together: well under a minute on two cores
    assert found["bytes"] < 4 * 2**30


RESNET101 = """
import copy, json, pathlib, re, time
import torch, torchvision
from tethertune.theory import certify
torch.set_num_threads(2)
torch.manual_seed(0)
reference = torchvision.models.resnet101(num_classes=10).eval()
model = copy.deepcopy(reference)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1e-3 * torch.randn_like(parameter))
batches = [(torch.rand(8, 3, 224, 224), torch.randint(10, (8,))) for _ in range(2)]
started = time.process_time()
found = certify(model, batches, reference=reference, head="fc")
seconds = time.process_time() - started
# Not ru_maxrss, which a child process inherits from its parent.
peak = int(re.search("VmHWM:\\\\s+([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1])
print(json.dumps({"layers": len(found.layers), "gap_log10": found.gap_log10, "seconds": seconds, "bytes": 1024 * peak}))
"""
