import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tethertune.errors import AttachError, ConfigurationError, PatternError, ReferenceMismatchError
from tethertune.penalty import Penalty

torch.set_num_threads(1)

LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "channels last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "batch norm": lambda: nn.BatchNorm2d(6),
    "attention": lambda: nn.MultiheadAttention(4, 2),
}


def wander(model, seed=0):
    """Move every parameter a little from where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))


def set_gradients(model, value=0.0):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def direct(model, penalty):
    """The gradients of an attached penalty after one step that changes nothing else."""
    set_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    penalty.attach(optimizer)
    optimizer.step()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def by_autograd(model, penalty):
    set_gradients(model)
    penalty().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_l2_sp_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    penalty = Penalty(model, strength=0.1, head="1", head_strength=2.0, factor=0.5)
    with torch.no_grad():
        model[0].weight.add_(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
        model[0].bias.add_(100.0)
        model[1].weight.copy_(torch.tensor([[3.0, 4.0]]))
    assert penalty().item() == pytest.approx(0.5 * (0.1 * 14.0 + 2.0 * 25.0))


def test_mars_sp_by_hand_is_not_squared():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    penalty = Penalty(model, norm="mars", strength=0.1, head="1", head_strength=2.0)
    with torch.no_grad():
        model[0].weight.add_(torch.tensor([[1.0, -2.0], [0.0, 3.5]]))
        model[1].weight.copy_(torch.tensor([[3.0, 4.0], [-6.0, 2.0]]))
    assert penalty().item() == pytest.approx(0.1 * 3.5 + 2.0 * 8.0)
    gradients = direct(model, penalty)
    torch.testing.assert_close(gradients["0.weight"], torch.tensor([[0.0, 0.0], [0.0, 0.1]]))
    torch.testing.assert_close(gradients["1.weight"], torch.tensor([[0.0, 0.0], [-2.0, 2.0]]))


@settings(deadline=None, max_examples=60)
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    norm=st.sampled_from(["frobenius", "mars"]),
    convention=st.sampled_from(["operator", "authors"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    strength=st.floats(1e-4, 10),
    seed=st.integers(0, 10_000),
)
def test_the_direct_gradient_is_that_of_autograd(*, layer, norm, convention, dtype, strength, seed):
    torch.manual_seed(seed)
    model = LAYERS[layer]().to(dtype)
    penalty = Penalty(model, norm=norm, strength=strength, include=["*"], convention=convention)
    wander(model, seed)
    expected = by_autograd(model, penalty)
    found = direct(model, penalty)
    for name, gradient in expected.items():
        tied = norm == "mars" and dtype is torch.bfloat16 and not torch.equal(gradient, found[name])
        if tied and (gradient != 0).sum() > (found[name] != 0).sum():
            continue  # coarse weights: two rows are equally large, and autograd moves each by half
        rounding = 2**-7 if dtype is torch.bfloat16 else 1e-6  # one unit in the last place of the stored gradient
        torch.testing.assert_close(found[name], gradient, rtol=rounding, atol=1e-6)
        assert gradient.any()


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_the_value_is_that_of_the_definition(norm):
    model = nn.Sequential(*(make() for make in LAYERS.values()))
    before = copy.deepcopy(model).double()
    penalty = Penalty(model, norm=norm, strength=0.3)
    wander(model)
    expected = 0.0
    for new, old in zip(model, before, strict=True):
        for name, weight in new.named_parameters():
            T = weight.detach().double() - old.get_parameter(name)
            if T.ndim == 1:
                continue
            if isinstance(new, nn.ConvTranspose2d):
                T = torch.cat([half.transpose(0, 1) for half in T.chunk(2)])
            T = T.flatten(1)
            expected += 0.3 * (T.abs().sum(1).max() if norm == "mars" else T.square().sum())
    torch.testing.assert_close(penalty().double(), expected, rtol=1e-6, atol=0)
    assert penalty().dtype is torch.float32
    assert penalty().shape == ()


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_at_the_reference_the_value_and_the_gradient_are_zero(norm):
    model = nn.Conv2d(3, 4, 3)
    penalty = Penalty(model, norm=norm, strength=2.0)
    assert penalty().item() == 0
    for gradients in (by_autograd(model, penalty), direct(model, penalty)):
        assert torch.equal(gradients["weight"], torch.zeros_like(model.weight))


def test_of_two_equally_large_rows_one_moves():
    model = nn.Linear(3, 4)
    penalty = Penalty(model, norm="mars", strength=0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
        model.weight.copy_(model.weight.round())
        penalty._reference._tensors["weight"].copy_(model.weight - 1)
    gradient = direct(model, penalty)["weight"]
    assert (gradient != 0).any(dim=1).sum() == 1
    assert gradient.sum().item() == pytest.approx(1.5)


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_attached_training_is_training_with_the_penalty_in_the_loss(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    images, labels = torch.randn(8, 3, 5, 5), torch.randint(2, (8,))
    trained = []
    for attached in (True, False):
        network = copy.deepcopy(model)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01, amsgrad=True)
        penalty = Penalty(network, norm=norm, strength=0.1, head="3", head_strength=0.01)
        if attached:
            penalty.attach(optimizer)
        for _ in range(5):
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            (loss if attached else loss + penalty()).backward()
            optimizer.step()
        trained.append(network)
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_is_added_to_what_is_there_and_in_place():
    model = nn.Linear(2, 2)
    penalty = Penalty(model, strength=1.0)
    before = model.weight.detach().clone()
    wander(model)
    set_gradients(model, 7.0)
    gradient = model.weight.grad
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    penalty.attach(optimizer)
    optimizer.step()
    assert model.weight.grad is gradient
    torch.testing.assert_close(gradient, 7 + 2 * (model.weight.detach() - before))
    assert torch.equal(model.bias.grad, torch.full((2,), 7.0))


def test_parameters_without_a_gradient_are_not_stepped():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    penalty = Penalty(model, strength=1.0)
    wander(model)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    penalty.attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_does_not_scale_the_penalty(norm, unscaled, fused):
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    stepped = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        network = copy.deepcopy(model)
        penalty = Penalty(network, norm=norm, strength=0.1)
        wander(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, fused=fused)
        penalty.attach(optimizer)
        loss = network(inputs).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        stepped.append(network.weight)
    torch.testing.assert_close(stepped[0], stepped[1])


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_a_step_never_waits_for_the_device(norm):
    """Tensors on ``meta`` have no values: whatever would copy one to the host fails on them."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)).to("meta")
    penalty = Penalty(model, norm=norm, strength=0.5, head="0", head_strength=0.5)
    set_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer)
    optimizer.step()
    optimizer.grad_scale = torch.tensor(2.0, device="meta")
    penalty._add_gradient(optimizer)
    with pytest.raises(RuntimeError, match="meta"):
        penalty().item()


def test_a_closure_gets_the_penalty_after_each_evaluation():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    target = torch.randn(2, 3)
    penalty = Penalty(model, strength=1.0)
    start = model.weight.detach().clone()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)
    penalty.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (model.weight - target).square().sum()
        loss.backward()
        return loss

    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        step()
        torch.testing.assert_close(model.weight.detach(), (start + target) / 2)


def test_a_step_within_a_step_counts_once():
    class Loud(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # makes torch put hooks into SGD.step
    model = nn.Linear(3, 2)
    penalty = Penalty(model, strength=1.0)
    wander(model)
    expected = by_autograd(model, penalty)["weight"]
    optimizer = Loud(model.parameters(), lr=0.0)
    penalty.attach(optimizer)
    for _ in range(2):
        set_gradients(model)
        optimizer.step()
        torch.testing.assert_close(model.weight.grad, expected)


def test_accelerate_is_unwrapped():
    from accelerate import Accelerator

    model = nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True)
    network, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    penalty = Penalty(network, strength=1.0)
    penalty.attach(optimizer)
    wander(model)
    set_gradients(model)
    optimizer.step()
    assert model.weight.grad.any()


@pytest.mark.parametrize(
    ("optimizer", "error"),
    [
        (lambda model: torch.optim.SGD(model[1].parameters(), lr=0.1), "does not hold 0.weight"),
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), "maximize=True"),
    ],
)
def test_an_optimizer_that_cannot_carry_it_is_refused(optimizer, error):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(AttachError, match=error):
        Penalty(model, strength=1.0).attach(optimizer(model))


def test_attaching_twice_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = Penalty(model, strength=1.0)
    penalty.attach(optimizer)
    with pytest.raises(AttachError, match="attached to this optimizer already"):
        penalty.attach(optimizer)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Penalty(model, strength=1.0).attach(optimizer)
    with pytest.raises(AttachError, match=r"gradient of 0.weight is sparse"):
        Penalty(model, strength=1.0, include=["0"]).attach(optimizer)


def test_the_authors_sum_the_change_of_batch_norm_scales():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    change = torch.tensor([1.0, -2.0, 0.5, 0.0])
    for norm, of_scale in (("mars", 3.5), ("frobenius", 5.25)):
        network = copy.deepcopy(model)
        penalty = Penalty(network, norm=norm, strength=2.0, convention="authors")
        with torch.no_grad():
            network[1].weight.add_(change)
            network[1].running_var.fill_(9.0)
        assert penalty().item() == pytest.approx(2 * of_scale)
        with torch.no_grad():
            network[0].weight.add_(1.0)
        assert penalty().item() == pytest.approx(2 * (of_scale + 36), rel=1e-5)


def test_a_tied_weight_counts_once():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "out": nn.Linear(3, 7, bias=False)})
    model["out"].weight = model["embed"].weight
    penalty = Penalty(model, strength=1.0)
    with torch.no_grad():
        model["out"].weight.add_(1.0)
    assert penalty().item() == pytest.approx(21, rel=1e-5)


def test_include_and_exclude():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert [x.name for x in Penalty(model, strength=1, include=["1.bias"], exclude=["0"]).layers] == [
        "1.weight",
        "1.bias",
    ]
    with pytest.raises(PatternError, match="exclude='2'"):
        Penalty(model, strength=1, exclude=["2"])
    with pytest.raises(ConfigurationError, match="on no parameter"):
        Penalty(model, strength=1, exclude=["*"])


def test_the_model_may_move_after_the_snapshot():
    model = nn.Conv2d(3, 4, 3)
    penalty = Penalty(model, strength=1.0)
    wander(model)
    value = penalty().item()
    model.to(memory_format=torch.channels_last)
    assert penalty().item() == pytest.approx(value)
    model.double()
    assert penalty().dtype is torch.float64
    assert penalty().item() == pytest.approx(value)


@pytest.mark.parametrize("source", [lambda model: model, lambda model: model.state_dict()], ids=["module", "dict"])
def test_a_given_reference_is_the_centre(source):
    model = nn.Linear(2, 2)
    original = copy.deepcopy(model)
    wander(model)
    penalty = Penalty(model, strength=1.0, reference=source(original))
    assert penalty().item() == pytest.approx((model.weight - original.weight).square().sum().item())
    with pytest.raises(ReferenceMismatchError, match="weight"):
        Penalty(model, strength=1.0, reference={"other": torch.zeros(2)})


def test_the_models_own_state_dict_is_copied():
    model = nn.Linear(2, 2)
    penalty = Penalty(model, strength=1.0, reference=model.state_dict())
    wander(model)
    assert penalty().item() > 0


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["strength", "head_strength", "factor"])
def test_strengths_are_finite_and_not_negative(name, value):
    options = {"strength": 1.0, "head": "1", "head_strength": 1.0, name: value}
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        Penalty(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **options)


def test_other_options_are_checked():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="norm='l2' is not known"):
        Penalty(model, norm="l2", strength=1.0)
    with pytest.raises(ConfigurationError, match=r"head_strength=1.0 needs head="):
        Penalty(model, strength=1.0, head_strength=1.0)


def test_a_head_without_a_strength_is_free():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    penalty = Penalty(model, strength=1.0, head="1")
    assert penalty().item() == 0
    assert not direct(model, penalty)["1.weight"].any()


def test_a_state_dict_carries_the_settings_around_the_same_reference(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    original = copy.deepcopy(model)
    saved = Penalty(model, norm="mars", strength=0.3, head="1", head_strength=0.2, factor=0.5)
    wander(model)
    torch.save(saved.state_dict(), tmp_path / "penalty.pt")
    state = torch.load(tmp_path / "penalty.pt", weights_only=True)

    resumed = Penalty(model, strength=9.0, head="1", head_strength=9.0, reference=original)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(), saved())
    assert resumed.state_dict() == state

    with pytest.raises(ReferenceMismatchError, match="not the one that this penalty was saved with"):
        Penalty(model, strength=1.0, head="1", head_strength=1.0).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="other layers"):
        Penalty(model, strength=1.0, reference=original).load_state_dict(state)


def test_a_copy_of_model_and_penalty_stays_together():
    model = nn.Linear(3, 2)
    penalty = Penalty(model, strength=1.0)
    for clone, its_penalty in (copy.deepcopy((model, penalty)), pickle.loads(pickle.dumps((model, penalty)))):
        wander(clone)
        assert its_penalty().item() > 0
        assert penalty().item() == 0


def test_strengths_may_follow_a_schedule():
    model = nn.Linear(3, 2)
    penalty = Penalty(model, strength=1.0)
    wander(model)
    value = penalty().item()
    penalty.strength = 0.5
    assert penalty().item() == pytest.approx(value / 2)
    penalty.strength = 0.0
    assert not direct(model, penalty)["weight"].any()


def test_several_optimizers_each_add_to_what_they_hold():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    penalty = Penalty(model, strength=1.0)
    wander(model)
    expected = by_autograd(model, penalty)
    set_gradients(model)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in model]
    penalty.attach(*optimizers)
    optimizers[0].step()
    assert not model[1].weight.grad.any()
    optimizers[1].step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_step_that_fails_costs_one_penalty_at_most():
    model = nn.Linear(3, 2)
    penalty = Penalty(model, strength=1.0)
    wander(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    penalty.attach(optimizer)

    def fail():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fail)
    expected = by_autograd(model, penalty)["weight"]
    optimizer.step()
    set_gradients(model)
    optimizer.step()
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_weights_take_l2_sp_directly():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    l2, expected = Penalty(model, strength=0.5), Penalty(plain, strength=0.5)
    mars = Penalty(model, norm="mars", strength=0.5)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    l2.attach(optimizer)
    expected.attach(reference)
    inputs = torch.randn(5, 3)
    for _ in range(3):
        for network, stepper in ((model, optimizer), (plain, reference)):
            stepper.zero_grad()
            network(inputs).square().sum().backward()
            stepper.step()
    for sharded, whole in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(sharded.full_tensor(), whole)
    with pytest.raises(ConfigurationError, match=r"0.weight is sharded over ranks: attach"):
        l2()
    with pytest.raises(ConfigurationError, match=r"0.weight is sharded over ranks, and none"):
        mars.attach(optimizer)
