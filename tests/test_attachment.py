import pytest
import torch
from torch import nn

from tethertune import rows
from tethertune.attachment import inner_optimizer, require_parameters
from tethertune.errors import AttachError

torch.set_num_threads(1)


def test_a_plain_optimizer_is_its_own_inner_optimizer():
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    assert inner_optimizer(optimizer) is optimizer


def test_the_wrapper_of_accelerate_is_taken_off():
    from accelerate import Accelerator

    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert inner_optimizer(Accelerator(cpu=True).prepare(optimizer)) is optimizer


def test_lookahead_is_refused_and_what_it_wraps_is_not():
    from timm.optim import Lookahead

    optimizer = Lookahead(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(AttachError, match="Lookahead does not call step hooks"):
        inner_optimizer(optimizer)
    assert inner_optimizer(optimizer._base_optimizer) is optimizer._base_optimizer


def test_a_schedule_free_optimizer_is_refused():
    class SGDScheduleFree(torch.optim.SGD):
        pass

    with pytest.raises(AttachError, match="SGDScheduleFree exchanges the weights"):
        inner_optimizer(SGDScheduleFree(nn.Linear(2, 2).parameters(), lr=0.1))


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(AttachError, match=r"object is not a torch.optim.Optimizer"):
        inner_optimizer(object())


def test_the_optimizer_must_hold_the_trained_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    found = rows.layers(model)
    require_parameters([torch.optim.SGD(model.parameters(), lr=0.1)], found)
    with pytest.raises(AttachError, match=r"does not hold 0.weight, 0.bias, 1.weight and 1 more: build it from"):
        require_parameters([torch.optim.SGD(model[2].parameters(), lr=0.1)], found)
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    require_parameters([torch.optim.SGD(model[2].parameters(), lr=0.1)], found)


def test_several_optimizers_may_hold_them_together():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    require_parameters([torch.optim.SGD(part.parameters(), lr=0.1) for part in model], rows.layers(model))
