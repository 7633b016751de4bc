"""A lazy constraint keeps the promise exactly, whatever happens between steps, and leaves most references unread."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tethertune as tt
from tethertune import norms, rows
from tethertune.errors import AttachError, NonFiniteWeightError
from tethertune.kernels import backend
from tethertune.optim import OnePass

torch.set_num_threads(1)

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "amsgrad fused": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, betas=(0.5, 0.9)),
    "high beta1": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.99, 0.9)),  # no bound in the long run
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, groups=2), nn.Flatten(), nn.Linear(200, 30)]
    return nn.Sequential(*body, nn.Tanh(), nn.Linear(30, 4)).to(dtype)


class Watched:
    """A network in training, with a lazy constraint, whose true distances are taken after every step in float64."""

    def __init__(self, radius=0.5, norm="mars", optimizer=OPTIMIZERS["adam"], dtype=torch.float32, **options):
        self.model, self.norm, self.dtype = network(dtype), norm, dtype
        self.layers = [layer for layer in rows.layers(self.model, head="6") if layer.rows.kind == "map"]
        self.before = {layer.name: layer.weight.detach().clone() for layer in self.layers}
        self.radius = radius
        options = {"reference": self.before} | options
        self.constraint = tt.Constraint(
            self.model, norm=norm, radius=radius, head="6", head_radius=1.0, lazy=True, **options
        )
        self.optimizer = optimizer(self.model.parameters())
        self.constraint.attach(self.optimizer)
        self.generator = torch.Generator().manual_seed(1)
        self.at_radius = 0

    def step(self, times=1, scale=1.0):
        for _ in range(times):
            x = torch.randn(8, 3, 6, 6, generator=self.generator).to(self.dtype)
            y = torch.randint(4, (8,), generator=self.generator)
            self.optimizer.zero_grad()
            (scale * nn.functional.cross_entropy(self.model(x).float(), y)).backward()
            self.optimizer.step()
            self.check()

    def check(self):
        for layer in self.layers:
            head = layer.role == "head"
            T = layer.weight.detach().double() - (0 if head else self.before[layer.name].double())
            distance = float((norms.mars if self.norm == "mars" else norms.frobenius)(layer.rows.matrix(T)))
            radius = 1.0 if head else self.radius
            assert distance <= radius, layer.name
            self.at_radius += not head and distance > 0.99 * radius

    @property
    def share(self):
        lazy = self.constraint._lazy
        return lazy.read / lazy.rows


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_no_step_leaves_a_ball_although_rows_stay_unread(norm, optimizer):
    watched = Watched(norm=norm, radius=1.5 if norm == "mars" else 0.5, optimizer=OPTIMIZERS[optimizer])
    watched.step(60)
    assert watched.at_radius
    assert watched.share < 1


def test_reads_drop_where_the_radius_is_large_beside_a_step(tmp_path):
    save_file(network().state_dict(), tmp_path / "reference.safetensors")
    shares = {}
    for radius in (0.2, 2.0, 20.0):
        watched = Watched(
            radius=radius,
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
            reference=tmp_path / "reference.safetensors",
        )
        watched.step(120)
        shares[radius] = watched.share
        assert watched.constraint.memory().reference == 0
    assert shares[0.2] > shares[2.0] > shares[20.0]
    assert shares[2.0] < 0.3
    assert shares[20.0] <= 3 / 120 + 0.01, "the first step, step 100, and little else"


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_16_bit_weights_and_a_16_bit_reference(norm):
    Watched(norm=norm, dtype=torch.bfloat16).step(20)
    watched = Watched(norm=norm, reference=network().bfloat16().float().state_dict())
    watched.before = {name: tensor.bfloat16() for name, tensor in watched.before.items()}
    watched.step(20)


def test_it_is_the_same_training_as_without():
    lazy, eager = Watched(), Watched()
    eager.constraint._lazy = None
    lazy.step(40)
    eager.step(40)
    assert lazy.share < 1
    for one, other in zip(lazy.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_bound_of_a_step_is_reached_by_the_worst_gradients():
    """Those for which Cauchy and Schwarz's inequality is an equality."""
    beta1, beta2, steps, lr = 0.9, 0.999, 80, 1e-3
    model = nn.Linear(1, 1, bias=False).double()
    constraint = tt.Constraint(model, radius=10.0, lazy=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-30)
    constraint.attach(optimizer)
    for k in range(1, steps + 1):
        before = model.weight.item()
        model.weight.grad = torch.full((1, 1), (beta1 / beta2) ** (steps - k), dtype=torch.float64)
        (known,) = constraint._lazy._followed.values() if k > 1 else [None]
        reach = math.inf if known is None else float(known.reach)
        optimizer.step()
        moved = abs(model.weight.item() - before)
        if known is not None:
            assert moved <= float(known.reach) - reach
    assert moved == pytest.approx(2.0 * lr, rel=0.05)  # B(80) of the measured table
    assert moved == pytest.approx(float(known.reach) - reach, rel=1e-3)


def write(watched):
    with torch.no_grad():
        watched.model[4].weight.add_(3.0)


def foreign_hook(watched):
    watched.optimizer.register_step_pre_hook(lambda *_: write(watched))


def foreign_hook_after_the_step(watched):
    watched.optimizer.register_step_post_hook(lambda *_: write(watched))
    watched.optimizer._optimizer_step_post_hooks.move_to_end(next(iter(watched.optimizer._optimizer_step_post_hooks)))


def another_optimizer(watched):
    watched.model[4].weight.grad = torch.ones_like(watched.model[4].weight)
    torch.optim.SGD(watched.model.parameters(), lr=3.0).step()


def replace(watched):
    group = watched.optimizer.param_groups[0]["params"]
    old = watched.model[4].weight
    watched.model[4].weight = nn.Parameter(old.detach() + 3.0)
    group[[id(p) for p in group].index(id(old))] = watched.model[4].weight


def load_averages(watched):
    state = watched.optimizer.state_dict()
    for of_parameter in state["state"].values():
        of_parameter["exp_avg"] = torch.full_like(of_parameter["exp_avg"], 1e3)
    watched.optimizer.load_state_dict(state)


def edit_averages(watched):
    for state in watched.optimizer.state.values():
        state["exp_avg"].fill_(1e3)


def shrink_squares(watched):
    for state in watched.optimizer.state.values():
        state["exp_avg_sq"].mul_(1e-12)


def more_learning(watched):
    watched.optimizer.param_groups[0]["lr"] = 1.0


def other_betas(watched):
    watched.optimizer.param_groups[0]["betas"] = (0.99, 0.5)


def smaller_radii(watched):
    watched.radius = 0.05
    watched.constraint.load_state_dict(
        {
            **watched.constraint.state_dict(),
            "settings": {**watched.constraint.state_dict()["settings"], "radius": 0.05},
        }
    )
    watched.constraint.project()


EVENTS = [
    write, foreign_hook, foreign_hook_after_the_step, another_optimizer, replace, load_averages, edit_averages,
    shrink_squares, more_learning, other_betas, smaller_radii,
]  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("event", EVENTS)
def test_nothing_between_steps_is_missed(event, fused):
    watched = Watched(radius=2.0, optimizer=lambda p: torch.optim.Adam(p, lr=1e-4, fused=fused))
    watched.step(5)
    read = watched.constraint._lazy.read
    assert watched.share < 0.5
    event(watched)
    watched.step(15)
    assert event in (other_betas, smaller_radii) or watched.constraint._lazy.read > read


def test_without_an_event_nothing_more_is_read():
    watched = Watched(radius=2.0, optimizer=lambda p: torch.optim.Adam(p, lr=1e-4))
    watched.step(1)
    read = watched.constraint._lazy.read
    watched.step(19)
    assert watched.constraint._lazy.read == read


def test_rows_that_become_nan_are_found_at_the_next_full_look():
    watched = Watched(radius=50.0, optimizer=lambda p: torch.optim.Adam(p, lr=1e-4), check_every=10)
    watched.step(3)
    watched.model[0].weight.grad = torch.full_like(watched.model[0].weight, math.nan)
    watched.optimizer.step()
    for _ in range(5):
        watched.optimizer.step()
    with pytest.raises(NonFiniteWeightError, match=r"0\.weight"):
        watched.optimizer.step()


def test_a_step_that_a_scaler_skips_moves_nothing():
    watched = Watched(radius=2.0, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for broken in (False, True, False, False):
        watched.optimizer.zero_grad()
        scaler.scale(watched.model(torch.ones(2, 3, 6, 6)).sum() * (math.inf if broken else 1.0)).backward()
        scaler.step(watched.optimizer)
        scaler.update()
        watched.check()
    assert watched.share < 0.5


class Odd(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, Odd]
)
def test_optimizers_without_a_bound_are_refused(optimizer):
    with pytest.raises(AttachError, match=f"lazy=True needs a bound .* {optimizer.__name__}"):
        Watched(optimizer=lambda p: optimizer(p, lr=0.1))


def test_what_only_an_accelerator_knows_is_refused():
    model = nn.Linear(3, 3).to("meta")
    from tethertune.lazy import require_bounded

    for options in ({"capturable": True}, {"lr": torch.tensor(0.1)}):
        with pytest.raises(AttachError, match="wait for the accelerator"):
            require_bounded(torch.optim.Adam(model.parameters(), foreach=False, **options))
    require_bounded(torch.optim.AdamW(model.parameters(), lr=0.1))


def test_two_lazy_optimizers_each_hold_a_part():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    constraint = tt.Constraint(model, radius=1.0, lazy=True)
    body, top = torch.optim.Adam(model[:4].parameters(), lr=1e-3), torch.optim.AdamW(model[4:].parameters(), lr=1e-2)
    constraint.attach(body, top)
    for _ in range(20):
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        body.step()
        top.step()
        assert all(d.value <= 1.0 for d in constraint.distances().values())
    assert constraint._lazy.read < constraint._lazy.rows
    assert not torch.equal(before[-2], model[6].weight)


def referenced(path, step):
    """How much of a mapped file this process has touched in a step, in KiB, as the kernel's page tables tell."""
    Path("/proc/self/clear_refs").write_text("1")
    step()
    of_file = Path("/proc/self/smaps").read_text().partition(str(path))[2]
    return int(re.search(r"Referenced:\s+(\d+) kB", of_file)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's page tables")
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, tt.optim.AdamW, tt.optim.SGD])
def test_the_pages_of_a_mapped_reference_stay_untouched(optimizer, tmp_path):
    if issubclass(optimizer, OnePass) and backend.choose(torch.device("cpu")) != "native":
        pytest.skip("the optimiser measures in C")
    model = nn.Linear(512, 1024, bias=False)
    path = tmp_path / "reference.safetensors"
    save_file(model.state_dict(), path)
    touched = {}
    for lazy, radius in ((False, 5.0), (True, 5.0), (True, 0.01)):
        if lazy is False and issubclass(optimizer, OnePass):
            continue
        constraint = tt.Constraint(model, radius=radius, reference=path, lazy=lazy)
        stepping = optimizer(model.parameters(), lr=1e-5)
        constraint.attach(stepping)
        for _ in range(3):
            model.weight.grad = torch.randn(1024, 512)
            stepping.step()
        model.weight.grad = torch.full((1024, 512), 3.0)
        touched[lazy, radius] = referenced(path, stepping.step)
    assert touched[True, 5.0] <= 64
    assert touched[True, 0.01] >= 1024
    assert touched.get((False, 5.0), 2048) >= 2048
