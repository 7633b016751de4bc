import copy

import pytest
import torch
from torch import nn

from tethertune import theory
from tethertune.errors import ReferenceMismatchError

torch.set_num_threads(1)


def test_measurements_for_any_network():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model[0].weight.add_(0.1 * torch.randn(4, 4))
    batches = [(torch.rand(8, 4), torch.arange(8) % 3)]
    with pytest.raises(theory.NotCoveredError):
        theory.certify(model, batches, reference=reference, head="2")
    (only,) = theory.measurements(model, reference=reference, head="2")
    assert (only.name, only.share) == ("0.weight", 1.0)
    difference = (model[0].weight - reference[0].weight).detach().double()
    assert only.distance == pytest.approx(float(difference.abs().sum(1).max()), rel=1e-6)
    assert only.frobenius == pytest.approx(float(difference.norm()), rel=1e-6)
    with pytest.raises(ReferenceMismatchError, match=r"has no 0.weight"):
        theory.measurements(model, reference={})


def test_a_state_by_name_is_as_good_as_a_network():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2))
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model[2].weight.mul_(1.5)
    by_state = theory.measurements(model, reference=reference.state_dict(), head="3")
    assert by_state == theory.measurements(model, reference=reference, head="3")
    assert [(layer.name, layer.share) for layer in by_state] == [("0.weight", 0.0), ("2.weight", 1.0)]
    assert by_state[1].distance == pytest.approx(0.5 * by_state[1].reference, rel=1e-6)
