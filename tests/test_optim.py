"""The optimisers do what PyTorch's do and the projection after them, whichever way it is done."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import tethertune as tt
from tethertune import optim
from tethertune.kernels import backend, library

try:
    library.load()
except library.CannotCompileError as error:  # then PyTorch's step and the hook do everything, and that is tested
    HAS_C, WHY_NOT = False, str(error)
else:
    HAS_C, WHY_NOT = True, ""
needs_c = pytest.mark.skipif(not HAS_C, reason=f"no C kernels: {WHY_NOT}")

ADAM = [
    {"weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize, "betas": betas}
    for decay, amsgrad, maximize in itertools.product((0.0, 0.1), (False, True), (False, True))
    for betas in ((0.9, 0.999), (0.0, 0.9), (0.3, 0.5))
]
SGD = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, nesterov in ((0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True))
    for decay, maximize in itertools.product((0.0, 0.1), (False, True))
]
CASES = [("Adam", o) for o in ADAM] + [("AdamW", o) for o in ADAM] + [("SGD", o) for o in SGD]
SOME = [("Adam", {"amsgrad": True}), ("AdamW", {}), ("SGD", {"momentum": 0.9})]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(75, 70),
        nn.Linear(70, 3),
    )
    return model.to(dtype)


def gradients(model, seed, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=random) * scale * (1 + seed % 5))


def constrain(model, norm="mars", radius=0.05, **given):
    return tt.Constraint(model, norm=norm, radius=radius, head="6", head_radius=0.3, **given)


def run(model, optimizer, steps, *, seed=0):
    for step in range(steps):
        gradients(model, 1000 * seed + step)
        optimizer.step()


def pair(kind, options, norm="mars", lr=0.01, ours=None, **given):
    """Ours and PyTorch's, on two copies of a network, each with its constraint."""
    made = []
    for library_, more in ((optim, ours or {}), (torch.optim, {"foreach": False})):
        model = net()
        optimizer = getattr(library_, kind)(model.parameters(), lr=lr, **options, **more)
        constraint = constrain(model, norm, **given)
        constraint.attach(optimizer)
        made.append((model, optimizer, constraint))
    return made


def apart(one, other):
    """The largest difference of two weights, relative to those above 1."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs)


def settled_in_c(optimizer):
    return {key for group in optimizer._groups.values() if group.table for key in group.table.settled}


def outside(constraint):
    return {n: d for n, d in constraint.distances().items() if d.value > d.radius}


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_trajectory_is_that_of_pytorch_and_the_projection_after_it(monkeypatch, kind, options, norm):
    (model, optimizer, constraint), (other, theirs, _) = pair(kind, options, norm)
    for step in range(50):
        gradients(model, step)
        optimizer.step()
        with monkeypatch.context() as chunked:
            chunked.setenv("TETHERTUNE_BACKEND", "chunked")
            gradients(other, step)
            theirs.step()
        assert apart(model, other) <= 1e-6, step
        assert step % 10 or not outside(constraint), step
    if HAS_C:
        names = {id(p): name for name, p in model.named_parameters()}
        gapless = {"0.weight", "2.weight", "5.weight", "6.weight"} | ({"3.weight"} if norm == "frobenius" else set())
        assert {names[key] for key in settled_in_c(optimizer)} == gapless


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_gradients_of_all_sizes(kind, norm):
    """A step may be so small that rounding decides whether a row at its radius is scaled in float32 or settled in
    float64, which aim ``2**-15`` of the radius apart."""
    (model, optimizer, constraint), (other, theirs, _) = pair(kind, {}, norm)
    for step in range(50):
        scale = 10.0 ** (step % 9 - 6)
        gradients(model, step, scale)
        gradients(other, step, scale)
        optimizer.step()
        theirs.step()
        assert not outside(constraint)
        assert apart(model, other) <= 1e-6 + 2**-15 * 0.3


@needs_c
@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_rows_that_are_far_inside_leave_when_they_must(norm):
    """Their centre is not read while they cannot have left; where they do leave, it is at the same step."""
    (model, optimizer, constraint), (other, theirs, _) = pair("SGD", {"momentum": 0.9}, norm, lr=1e-5, radius=0.3)
    inside, active = set(), set()
    for step in range(120):
        gradients(model, step // 5 * 5 + 3)
        gradients(other, step // 5 * 5 + 3)
        optimizer.step()
        theirs.step()
        assert apart(model, other) <= 1e-6, step
        found = constraint.distances()["5.weight"]
        assert found.value <= found.radius
        (active if found.active_rows else inside).add(step)
    assert len(inside) > 10
    assert len(active) > 10


@pytest.mark.parametrize("write", ["add_", "data", "numpy", "swapped"])
def test_weights_written_between_steps_are_noticed(write):
    model = nn.Linear(64, 4)
    constraint = tt.Constraint(model, radius=1.0)
    optimizer = optim.SGD(model.parameters(), lr=1e-6)
    constraint.attach(optimizer)
    for step in range(3):
        gradients(model, step)
        optimizer.step()
    far = model.weight.detach() + 1
    if write == "add_":
        with torch.no_grad():
            model.weight.add_(1)
    elif write == "data":
        model.weight.data[2, 17] += 100
    elif write == "numpy":
        model.weight.detach().numpy()[:] += 1
    else:
        model.weight.data = far
    gradients(model, 3)
    optimizer.step()
    assert not outside(constraint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reference_in_16_bits(dtype):
    given = {"reference_dtype": dtype, "radius": 0.5}
    (model, optimizer, constraint), (other, theirs, _) = pair("Adam", {}, **given)
    run(model, optimizer, 20)
    run(other, theirs, 20)
    assert apart(model, other) <= 1e-6
    assert not outside(constraint)


@pytest.mark.parametrize("radius", [0.0, 1e-12, 1e-7, 1e-3])
@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_radii_near_the_rounding_of_the_weights(norm, radius):
    model = net()
    constraint = tt.Constraint(model, norm=norm, radius=radius)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    constraint.attach(optimizer)
    for step in range(10):
        run(model, optimizer, 1, seed=step)
        assert not outside(constraint)


def test_rows_of_all_lengths():
    random = torch.Generator().manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, 3) for n in (1, 2, 9, 15, 16, 17, 31, 63, 64, 65, 2047, 2048, 2049, 5000, 40000))
    other = copy.deepcopy(model)
    for net_, kind in ((model, optim.Adam), (other, torch.optim.Adam)):
        constraint = tt.Constraint(net_, radius=0.01)
        optimizer = kind(net_.parameters(), lr=1e-3)
        constraint.attach(optimizer)
        random.manual_seed(1)
        for _ in range(5):
            for p in net_.parameters():
                p.grad = torch.randn(p.shape, generator=random)
            optimizer.step()
        assert not outside(constraint)
    assert apart(model, other) <= 1e-6


@needs_c
@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_the_bits_do_not_depend_on_the_number_of_threads(norm):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 1100))
            constraint = tt.Constraint(model, norm=norm, radius=0.1)
            optimizer = optim.Adam(model.parameters(), lr=0.01)
            constraint.attach(optimizer)
            run(model, optimizer, 4)
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


class TestFallingBack:
    """PyTorch's own step and the hook, with the same result."""

    def check(self, model, optimizer, constraint, kind="Adam", **options):
        other = copy.deepcopy(model)
        theirs = getattr(torch.optim, kind)(other.parameters(), lr=0.01, **options)
        constrain(other).attach(theirs)
        constraint.attach(optimizer)
        run(model, optimizer, 8)
        run(other, theirs, 8)
        assert apart(model, other) <= 1e-6
        assert not outside(constraint)
        return {key for group in optimizer._groups.values() if group.table for key in group.table.settled}

    @pytest.mark.parametrize("asked", [{"fused": False}, {"foreach": True}])
    def test_where_it_is_asked_for(self, asked):
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01, **asked)
        assert not self.check(model, optimizer, constrain(model))

    def test_without_a_compiler(self, monkeypatch):
        monkeypatch.setattr(backend, "choose", lambda _device: "chunked")
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        assert not self.check(model, optimizer, constrain(model))

    @pytest.mark.parametrize("forced", ["chunked", "triton"])
    def test_where_another_backend_is_forced(self, monkeypatch, forced):
        monkeypatch.setenv("TETHERTUNE_BACKEND", forced)
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        run(model, optimizer, 1)
        assert not optimizer._groups

    @pytest.mark.parametrize(
        ("kind", "dtype"), [("Adam", torch.bfloat16), ("Adam", torch.float64), ("SGD", torch.float16)], ids=str
    )
    def test_other_dtypes(self, kind, dtype):
        model = net(dtype)
        optimizer = getattr(optim, kind)(model.parameters(), lr=0.01)
        constraint = tt.Constraint(model, radius=0.5)
        constraint.attach(optimizer)
        run(model, optimizer, 4)
        assert not outside(constraint)

    def test_mixed_dtypes_in_one_group(self):
        model = net()
        model[5].to(torch.bfloat16)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        other = copy.deepcopy(model)
        theirs = torch.optim.AdamW(other.parameters(), lr=0.01)
        for net_, one in ((model, optimizer), (other, theirs)):
            constraint = tt.Constraint(net_, radius=0.3)
            constraint.attach(one)
            run(net_, one, 6)
            assert not outside(constraint)
        assert apart(model, other) <= 1e-6
        if HAS_C:
            assert id(model[0].weight) in settled_in_c(optimizer)
            assert id(model[5].weight) not in settled_in_c(optimizer)

    def test_sparse_gradients(self):
        model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
        constraint = tt.Constraint(model, radius=0.1, include=["0.weight"])
        optimizer = optim.SGD(model.parameters(), lr=0.5)
        constraint.attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.tensor([1, 3])).square().sum().backward()
            optimizer.step()
        assert not outside(constraint)
        adam = optim.Adam(model.parameters())
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            adam.step()

    def test_a_grad_scaler_that_leaves_the_scale_to_the_optimiser(self):
        states = []
        for library_ in (optim, torch.optim):
            model = net()
            optimizer = library_.Adam(model.parameters(), lr=0.01, fused=True)
            constraint = constrain(model)
            constraint.attach(optimizer)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            for broken in (False, True, False):
                optimizer.zero_grad()
                torch.manual_seed(1)
                loss = model(torch.randn(2, 3, 8, 8)).square().sum() * (math.inf if broken else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                assert not outside(constraint)
            states.append(model)
        assert apart(*states) <= 1e-6

    def test_a_learning_rate_that_is_learnt(self):
        model = nn.Linear(3, 2)
        rate = torch.tensor(0.1, requires_grad=True)
        optimizer = optim.SGD(model.parameters(), lr=rate, differentiable=True)
        assert not optimizer._is_for_c(optimizer.param_groups[0])

    @pytest.mark.parametrize("kind", ["Adam", "SGD"])
    def test_a_compiled_step_does_not_step_while_it_is_traced(self, kind):
        model, other = net(), net()
        optimizer = getattr(optim, kind)(model.parameters(), lr=0.01)
        theirs = getattr(torch.optim, kind)(other.parameters(), lr=0.01)
        constraint = constrain(model)
        constraint.attach(optimizer)
        constrain(other).attach(theirs)
        compiled = torch.compile(optimizer.step, backend="eager")
        for step in range(3):
            gradients(model, step)
            gradients(other, step)
            compiled()
            theirs.step()
            assert not outside(constraint)
            assert apart(model, other) <= 1e-6


class TestState:
    @pytest.mark.parametrize(("kind", "options"), SOME, ids=str)
    @pytest.mark.parametrize("fused", [None, True])
    def test_its_form_is_that_of_pytorch(self, kind, options, fused):
        (model, optimizer, _), (other, theirs, _) = pair(kind, options, ours={"fused": fused})
        run(model, optimizer, 2)
        run(other, theirs, 2)
        ours, wanted = optimizer.state_dict(), theirs.state_dict()
        assert ours.keys() == wanted.keys()
        for group, theirs_ in zip(ours["param_groups"], wanted["param_groups"], strict=True):
            assert {**group, "fused": 0, "foreach": 0} == {**theirs_, "fused": 0, "foreach": 0}
        assert ours["state"].keys() == wanted["state"].keys()
        for key, state in ours["state"].items():
            assert list(state) == list(wanted["state"][key])
            for name, tensor in state.items():
                like = wanted["state"][key][name]
                assert (tensor.dtype, tensor.shape, tensor.stride()) == (like.dtype, like.shape, like.stride())
                torch.testing.assert_close(tensor, like, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(("kind", "options"), SOME, ids=str)
    @pytest.mark.parametrize("to_ours", [True, False])
    def test_it_loads_into_the_other_class(self, kind, options, to_ours):
        (model, optimizer, constraint), (other, theirs, _) = pair(kind, options, ours={"fused": True})
        run(other, theirs, 3)
        run(model, optimizer, 3)
        if to_ours:
            optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
            optimizer.param_groups[0]["foreach"] = None
        else:
            theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for step in range(3, 9):
            gradients(model, step)
            gradients(other, step)
            optimizer.step()
            theirs.step()
        assert apart(model, other) <= 1e-6
        assert not outside(constraint)

    @pytest.mark.parametrize(("kind", "options"), SOME, ids=str)
    def test_resuming_is_bit_for_bit(self, kind, options, tmp_path):
        model = net()
        optimizer = getattr(optim, kind)(model.parameters(), lr=0.01, **options)
        constraint = constrain(model, radius=1.0)
        constraint.attach(optimizer)
        run(model, optimizer, 5)
        torch.save([model.state_dict(), optimizer.state_dict(), constraint.state_dict()], tmp_path / "state.pt")
        run(model, optimizer, 5, seed=1)

        again = net()
        resumed = getattr(optim, kind)(again.parameters(), lr=0.5, **options)
        other = constrain(again, radius=1.0)
        saved = torch.load(tmp_path / "state.pt")
        again.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        other.load_state_dict(saved[2])
        other.attach(resumed)
        run(again, resumed, 5, seed=1)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_loading_a_state_in_the_middle(self):
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        constraint = constrain(model)
        constraint.attach(optimizer)
        run(model, optimizer, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        weights = copy.deepcopy(model.state_dict())
        run(model, optimizer, 3)
        wanted = [p.detach().clone() for p in model.parameters()]
        optimizer.load_state_dict(saved)
        model.load_state_dict(weights)
        run(model, optimizer, 3)
        assert len(optimizer._groups) <= 1
        assert all(torch.equal(a, b) for a, b in zip(wanted, model.parameters(), strict=True))

    def test_state_that_someone_replaces(self):
        (model, optimizer, _), (other, theirs, _) = pair("Adam", {})
        for step in range(4):
            for net_, one in ((model, optimizer), (other, theirs)):
                gradients(net_, step)
                one.step()
                one.state[net_[5].weight]["exp_avg"] = torch.zeros_like(net_[5].weight)
                one.state[net_[6].weight] = {}
                one.state[net_[0].weight]["exp_avg_sq"].data = torch.ones_like(net_[0].weight)
            assert apart(model, other) <= 1e-6

    def test_copies(self):
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        constrain(model).attach(optimizer)
        run(model, optimizer, 2)
        for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert type(copied) is optim.Adam
            assert not copied._tethers
            for p in copied.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            copied.step()  # without a constraint: PyTorch copies no hooks
        run(model, optimizer, 2)


class TestChanges:
    """What may change between two steps."""

    def both(self, change, kind="Adam", steps=4, **options):
        (model, optimizer, constraint), (other, theirs, reference) = pair(kind, options)
        for number in range(3):
            for net_, one in ((model, optimizer), (other, theirs)):
                run(net_, one, steps, seed=number)
            assert apart(model, other) <= 1e-6
            assert not outside(constraint)
            change(model, optimizer, constraint, number)
            change(other, theirs, reference, number)
        return model, optimizer

    def test_a_schedule(self):
        (model, optimizer, _), (other, theirs, _) = pair("Adam", {})
        for net_, one in ((model, optimizer), (other, theirs)):
            schedule = torch.optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=10, three_phase=True)
            for step in range(10):
                run(net_, one, 1, seed=step)
                schedule.step()
        assert apart(model, other) <= 1e-6

    def test_freezing_and_thawing(self):
        def change(model, optimizer, _constraint, number):
            model[5].requires_grad_(number == 1)
            optimizer.zero_grad()

        (model, optimizer, constraint), (other, theirs, reference) = pair("Adam", {})
        for number in range(4):
            for net_, one in ((model, optimizer), (other, theirs)):
                for step in range(3):
                    gradients(net_, step + 10 * number)
                    if not net_[5].weight.requires_grad:
                        net_[5].weight.grad = net_[5].bias.grad = None
                    one.step()
            assert apart(model, other) <= 1e-6
            assert not outside(constraint)
            change(model, optimizer, constraint, number)
            change(other, theirs, reference, number)

    def test_gradients_that_come_and_go(self):
        (model, optimizer, constraint), (other, theirs, _) = pair("SGD", {"momentum": 0.9})
        for step in range(12):
            for net_, one in ((model, optimizer), (other, theirs)):
                gradients(net_, step)
                for number, p in enumerate(net_.parameters()):
                    if (step + number) % 3 == 0:
                        p.grad = None
                one.step()
            assert apart(model, other) <= 1e-6
            assert not outside(constraint)

    def test_moved_weights(self):
        def change(model, _optimizer, _constraint, number):
            model[5].weight.data = model[5].weight.data.clone()
            if number:
                model.to(memory_format=torch.channels_last)

        self.both(change)

    def test_other_balls(self):
        def change(_model, _optimizer, constraint, number):
            state = constraint.state_dict()
            state["settings"] = {**state["settings"], "radius": 0.5 if number else 0.01}
            constraint.load_state_dict(state)
            constraint.project()

        self.both(change)

    def test_amsgrad_switched_on_and_groups_added(self):
        model = net()
        optimizer = optim.Adam(model[:3].parameters(), lr=0.01)
        optimizer.add_param_group({"params": list(model[3:].parameters()), "lr": torch.tensor(0.1), "eps": 1e-3})
        other = net()
        theirs = torch.optim.Adam(other[:3].parameters(), lr=0.01)
        theirs.add_param_group({"params": list(other[3:].parameters()), "lr": torch.tensor(0.1), "eps": 1e-3})
        for net_, one in ((model, optimizer), (other, theirs)):
            constrain(net_).attach(one)
            run(net_, one, 5)
        assert apart(model, other) <= 1e-6
        assert not HAS_C or len(optimizer._groups) == 2


class TestTogether:
    def test_two_constraints_on_one_optimiser(self):
        nets = []
        for library_ in (optim, torch.optim):
            model = net()
            optimizer = library_.Adam(model.parameters(), lr=0.01)
            body = tt.Constraint(model, norm="mars", radius={"0.*": 0.1, "5.*": 0.1})
            rest = tt.Constraint(model, norm="frobenius", radius={"2.*": 0.1, "5.*": 0.03})
            body.attach(optimizer)
            rest.attach(optimizer)
            for step in range(6):
                run(model, optimizer, 1, seed=step)
                assert not outside(rest)
            nets.append(model)
            if library_ is optim and HAS_C:
                assert settled_in_c(optimizer) == {id(model[0].weight), id(model[2].weight)}
        assert apart(*nets) <= 1e-6

    def test_one_constraint_on_two_optimisers(self):
        nets = []
        for library_ in (optim, torch.optim):
            model = net()
            one, two = library_.Adam(model[:4].parameters(), lr=0.01), library_.SGD(model[4:].parameters(), lr=0.1)
            constraint = constrain(model)
            constraint.attach(one, two)
            for step in range(5):
                gradients(model, step)
                one.step()
                assert not outside(constraint)
                two.step()
                assert not outside(constraint)
            nets.append(model)
        assert apart(*nets) <= 1e-6

    def test_hooks_of_others_fire_once_and_are_not_trusted(self):
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        calls = []

        def write(*_):
            calls.append("post")
            with torch.no_grad():
                model[5].weight.add_(1)

        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(write)
        constraint = constrain(model)
        constraint.attach(optimizer)
        run(model, optimizer, 3)
        assert calls == ["pre", "post"] * 3
        assert not outside(constraint)
        assert not settled_in_c(optimizer)

    def test_a_penalty_beside_it(self):
        nets = []
        for library_ in (optim, torch.optim):
            model = net()
            optimizer = library_.SGD(model.parameters(), lr=0.01)
            tt.Penalty(model, norm="frobenius", strength=0.1).attach(optimizer)
            constrain(model).attach(optimizer)
            run(model, optimizer, 5)
            nets.append(model)
            assert library_ is torch.optim or not HAS_C or settled_in_c(optimizer)
        assert apart(*nets) <= 1e-6

    def test_a_closure(self):
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        constraint = constrain(model)
        constraint.attach(optimizer)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3, 8, 8)).square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(20)]
        assert losses[-1] < losses[0]
        assert not outside(constraint)

    def test_accelerate(self):
        from accelerate import Accelerator

        model = net()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
        constraint = constrain(model)
        constraint.attach(optimizer)
        run(model, optimizer, 3)
        assert isinstance(optimizer.optimizer, torch.optim.AdamW)
        assert not outside(constraint)
        assert not HAS_C or settled_in_c(optimizer.optimizer)

    def test_a_weight_that_is_not_finite_is_left_and_named(self):
        for norm in ("mars", "frobenius"):
            model = net()
            optimizer = optim.SGD(model.parameters(), lr=0.1)
            constraint = constrain(model, norm)
            constraint.attach(optimizer)
            gradients(model, 0)
            model[5].weight.grad[3, 4] = math.nan
            with pytest.raises(tt.errors.NonFiniteWeightError, match=r"5\.weight holds a NaN"):
                optimizer.step()
            if norm == "mars":
                with torch.no_grad():
                    model[5].weight[3, 4] = 0
                constraint.project()
                assert not outside(constraint)


def test_autograd_sees_that_the_weights_have_changed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(1, 3)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_arguments_are_those_of_pytorch():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optim.Adam(net().parameters(), lr=-1)
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        optim.SGD(net().parameters(), nesterov=True)
    assert isinstance(optim.AdamW(net().parameters()), torch.optim.AdamW)
    assert tt.optim is optim
