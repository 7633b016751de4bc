"""The promise of the constraint, in the settings that people train in."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tethertune as tt
from tethertune.errors import (
    AttachError,
    ConfigurationError,
    NonFiniteWeightError,
    PatternError,
    ReferenceMismatchError,
)


class Net(nn.Module):
    """A little of everything: convolutions of three kinds, batch norm, a transposed one, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.scale = nn.Parameter(torch.ones(6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(torch.relu(self.bn(self.stem(x)))))
        return self.fc((x * self.scale.view(1, -1, 1, 1)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def true_distances(model: nn.Module, before: dict[str, Tensor], norm: str, head: str = "fc") -> dict[str, float]:
    """In float64 from the stored weights, written without the library: rows of these layers by hand."""
    result = {}
    for name, parameter in model.state_dict().items():
        if parameter.ndim < 2:
            continue
        centre = torch.zeros_like(parameter) if name.startswith(head) else before[name]
        T = parameter.double() - centre.double()
        if norm == "frobenius":
            result[name] = float(T.square().sum().sqrt())
        elif name == "up.weight":  # (in, out/groups, 2, 2), two groups: a row is an output channel of a group
            result[name] = max(float(T[:4].abs().sum((0, 2, 3)).max()), float(T[4:].abs().sum((0, 2, 3)).max()))
        else:
            result[name] = float(T.abs().flatten(1).sum(1).max())
    return result


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        model(x if dtype is None else x.to(dtype)).square().sum().backward()
        optimizer.step()


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "amsgrad fused": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.5),
}


class TestPromise:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    def test_after_every_step_every_layer_is_inside(self, net, norm, optimizer):
        before = snapshot(net)
        constraint = tt.Constraint(net, norm=norm, radius=0.1, head="fc", head_radius=0.3)
        optimizer = OPTIMIZERS[optimizer](net.parameters())
        constraint.attach(optimizer)
        for _ in range(4):
            train(net, optimizer, steps=1)
            for name, distance in true_distances(net, before, norm).items():
                assert distance <= (0.3 if name.startswith("fc") else 0.1), name
        at_radius = [d.value >= 0.99 * d.radius for d in constraint.distances().values()]
        assert any(at_radius), "nothing reached its radius, so nothing was tested"

    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_in_every_stored_dtype(self, net, norm, dtype):
        net.to(dtype)
        before = snapshot(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        tt.Constraint(net, norm=norm, radius=0.05, head="fc", head_radius=0.3).attach(optimizer)
        for _ in range(3):
            train(net, optimizer, steps=1, dtype=dtype)
            for name, distance in true_distances(net, before, norm).items():
                assert distance <= (0.3 if name.startswith("fc") else 0.05), name

    @pytest.mark.parametrize("projection", ["radial", "euclidean"])
    def test_both_projections(self, net, projection):
        before = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        tt.Constraint(net, radius=0.1, projection=projection).attach(optimizer)
        train(net, optimizer)
        assert max(true_distances(net, before, "mars", head="-").values()) <= 0.1

    def test_channels_last_and_strided_weights(self, net):
        net = net.to(memory_format=torch.channels_last)
        net.fc.weight = nn.Parameter(torch.randn(6, 4).t())  # rows that do not lie together in memory
        before = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        tt.Constraint(net, radius=0.1).attach(optimizer)
        train(net, optimizer)
        assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)
        assert max(true_distances(net, before, "mars", head="-").values()) <= 0.1

    def test_rows_inside_keep_their_bits(self, net):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        constraint = tt.Constraint(net, radius=0.1)
        with torch.no_grad():
            net.stem.weight[0] += 1.0  # one row outside, the others moved a little and inside
            net.stem.weight[1:] += 1e-3
        before = snapshot(net)
        constraint.project()
        assert torch.equal(net.stem.weight[1:], before["stem.weight"][1:])
        assert not torch.equal(net.stem.weight[0], before["stem.weight"][0])
        again = snapshot(net)
        constraint.attach(optimizer)
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in again.items())

    def test_amp_with_a_skipped_step(self, net):
        before = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05, fused=True)
        tt.Constraint(net, radius=0.1).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for broken in (False, True, False):
            optimizer.zero_grad()
            loss = net(torch.ones(2, 3, 8, 8)).square().sum() * (math.inf if broken else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert max(true_distances(net, before, "mars", head="-").values()) <= 0.1

    def test_gradient_accumulation_projects_once_a_step(self, net, monkeypatch):
        constraint = tt.Constraint(net, radius=0.1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        constraint.attach(optimizer)
        calls = []
        monkeypatch.setattr(constraint, "_after_step", lambda *_: calls.append(1))
        for i in range(4):
            net(torch.ones(2, 3, 8, 8)).sum().backward()
            if i % 2:
                optimizer.step()
        assert len(calls) == 2

    def test_compiled_model_keeps_its_names(self, net):
        compiled = torch.compile(net, backend="eager")
        constraint = tt.Constraint(compiled, radius=0.1, head="fc", head_radius=0.2)
        assert "stem.weight" in constraint.distances()

    def test_tied_weights_are_projected_once_to_the_smallest_radius(self):
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        constraint = tt.Constraint(model, radius={"a.*": 2.0, "b.*": 0.5})
        with torch.no_grad():
            model["a"].weight += 1.0
        before = model["a"].weight.detach() - 1.0
        constraint.project()
        distance = constraint.distances()["a.weight"]
        assert distance.radius == 0.5
        torch.testing.assert_close((model["a"].weight - before).abs().sum(1), torch.full((3,), 0.5), rtol=1e-4, atol=0)

    def test_several_optimizers_together_hold_the_weights(self, net):
        before = snapshot(net)
        body = torch.optim.SGD([p for n, p in net.named_parameters() if not n.startswith("fc")], lr=0.1)
        head = torch.optim.Adam(net.fc.parameters(), lr=0.1)
        tt.Constraint(net, radius=0.1, head="fc", head_radius=0.2).attach(body, head)
        net(torch.ones(2, 3, 8, 8)).square().sum().backward()
        body.step()
        head.step()
        assert all(d <= (0.2 if n.startswith("fc") else 0.1) for n, d in true_distances(net, before, "mars").items())


class TestRadius:
    def test_infinite_is_free_and_zero_is_frozen_exactly(self, net):
        before = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        constraint = tt.Constraint(net, radius={"stem*": 0.0, "up*": math.inf, "fc*": 0.1})
        constraint.attach(optimizer)
        train(net, optimizer)
        assert torch.equal(net.stem.weight, before["stem.weight"])
        assert set(constraint.distances()) == {"stem.weight", "fc.weight"}
        assert true_distances(net, before, "mars", head="-")["up.weight"] > 0.1

    def test_the_first_matching_pattern_counts_and_the_rest_is_free(self, net):
        constraint = tt.Constraint(net, radius={"stem.weight": 1.0, "*.weight": tt.Relative(0.1)})
        distances = constraint.distances()
        assert distances["stem.weight"].radius == 1.0
        own = float(net.depthwise.weight.detach().double().abs().sum((1, 2, 3)).max())
        assert distances["depthwise.weight"].radius == pytest.approx(0.1 * own, rel=1e-12)

    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    def test_relative_is_a_share_of_each_layers_own_norm(self, net, norm):
        constraint = tt.Constraint(net, norm=norm, radius=tt.Relative(0.02))
        zero = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
        own = true_distances(net, zero, norm, head="-")
        for name, distance in constraint.distances().items():
            assert distance.radius == pytest.approx(0.02 * own[name], rel=1e-6)

    @pytest.mark.parametrize("radius", [-1.0, math.nan, "8", None, True, {}, {"stem*": -1.0}])
    def test_what_is_not_a_radius_is_refused(self, net, radius):
        with pytest.raises(ConfigurationError, match="radius"):
            tt.Constraint(net, radius=radius)

    def test_relative_refuses_what_is_not_a_ratio(self):
        with pytest.raises(ConfigurationError, match="Relative"):
            tt.Relative(-0.1)

    def test_a_head_radius_needs_a_head(self, net):
        with pytest.raises(ConfigurationError, match="head="):
            tt.Constraint(net, radius=1.0, head_radius=1.0)


class TestChoice:
    def test_defaults_leave_biases_normalisation_and_unknown_parameters_free(self, net):
        constraint = tt.Constraint(net, radius=1.0, head="fc", head_radius=2.0)
        assert set(constraint.distances()) == {"stem.weight", "depthwise.weight", "up.weight", "fc.weight"}
        summary = constraint.summary()
        assert summary.startswith("4 of 10 tensors constrained, head fc, norm mars, ")
        assert "scale" in summary

    def test_a_head_without_a_radius_is_free(self, net):
        assert "fc.weight" not in tt.Constraint(net, radius=1.0, head="fc").distances()

    def test_include_and_exclude(self, net):
        constraint = tt.Constraint(net, radius=1.0, include=["scale", "bn"], exclude=["up"])
        assert set(constraint.distances()) == {
            "stem.weight",
            "bn.weight",
            "bn.bias",
            "depthwise.weight",
            "scale",
            "fc.weight",
        }
        with torch.no_grad():
            net.scale += torch.arange(6.0)
        constraint.project()
        assert net.scale.tolist() == pytest.approx([1, 2, 2, 2, 2, 2], rel=1e-4)

    def test_frozen_affine_parameters_stay_at_the_reference_exactly(self, net):
        before = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        tt.Constraint(net, radius=0.1, head="fc", head_radius=1.0, affine="frozen").attach(optimizer)
        train(net, optimizer)
        for name in ("stem.bias", "bn.weight", "bn.bias", "up.bias"):
            assert torch.equal(net.state_dict()[name], before[name])
        assert not torch.equal(net.fc.bias, before["fc.bias"])

    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    def test_a_frozen_bias_of_the_head_is_zero_exactly(self, net, norm):
        before = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        constraint = tt.Constraint(net, norm=norm, radius=0.1, head="fc", head_radius=1.0, head_bias="frozen")
        constraint.attach(optimizer)
        train(net, optimizer)
        assert not net.fc.bias.any()
        assert constraint.distances()["fc.bias"].radius == 0
        assert not torch.equal(net.bn.bias, before["bn.bias"])
        again = tt.Constraint(net, norm=norm, radius=0.1, head="fc", head_radius=1.0, reference=before)
        again.load_state_dict(constraint.state_dict())
        assert "fc.bias" in again.distances()
        older = constraint.state_dict()
        del older["settings"]["head_bias"]  # as 0.1.0 wrote it
        again.load_state_dict(older)
        assert "fc.bias" not in again.distances()
        with pytest.raises(ConfigurationError, match="needs head="):
            tt.Constraint(net, radius=0.1, head_bias="frozen")

    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    def test_authors_convention_bounds_the_normalised_scale_per_channel(self, net, norm):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        start = net.bn.weight.detach().double() / (net.bn.running_var.double() + 1e-6).sqrt()
        constraint = tt.Constraint(net, norm=norm, radius=0.02, convention="authors")
        constraint.attach(optimizer)
        train(net, optimizer, steps=5)
        now = net.bn.weight.detach().double() / (net.bn.running_var.double() + 1e-6).sqrt()
        assert float((now - start).abs().max()) <= 0.02
        assert not torch.allclose(net.bn.running_var, torch.ones(8), atol=0.05), "the variance has to move"
        assert constraint.distances()["bn.weight"].value == pytest.approx(float((now - start).abs().max()), rel=1e-9)

    def test_authors_convention_takes_a_depthwise_kernel_as_one_row(self, net):
        with torch.no_grad():
            constraint = tt.Constraint(net, radius=0.8, convention="authors")
            net.depthwise.weight += 1.0
        constraint.project()
        distance = constraint.distances()["depthwise.weight"]
        assert distance.rows == 1
        assert distance.value == pytest.approx(0.8, rel=1e-4)

    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_a_pattern_that_matches_nothing_is_an_error(self, net, argument):
        with pytest.raises(PatternError, match="stemm"):
            tt.Constraint(net, radius=1.0, **{argument: ["stemm*"]})
        with pytest.raises(PatternError, match="radius"):
            tt.Constraint(net, radius={"stemm*": 1.0})

    @pytest.mark.parametrize("argument", ["norm", "affine", "head_bias", "convention", "projection"])
    def test_unknown_words_are_refused_with_what_is_allowed(self, net, argument):
        with pytest.raises(ConfigurationError, match=f"{argument}='mar'"):
            tt.Constraint(net, radius=1.0, **{argument: "mar"})

    def test_integer_weights_are_refused(self):
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ConfigurationError, match="int8"):
            tt.Constraint(model, radius=1.0)


class TestReference:
    def test_original_weights_given_after_loading_the_fine_tuned_ones(self, net, tmp_path):
        original = snapshot(net)
        save_file(original, tmp_path / "w0.safetensors")
        with torch.no_grad():
            net.stem.weight += 1.0
        for reference in (original, str(tmp_path / "w0.safetensors")):
            moved = copy.deepcopy(net)
            constraint = tt.Constraint(moved, radius=0.5, reference=reference)
            constraint.project()
            assert true_distances(moved, original, "mars", head="-")["stem.weight"] == pytest.approx(0.5, rel=1e-4)

    def test_the_live_state_dict_is_copied(self, net):
        before = snapshot(net)
        constraint = tt.Constraint(net, radius=0.5, reference=net.state_dict())
        with torch.no_grad():
            net.stem.weight += 1.0
        constraint.project()
        assert true_distances(net, before, "mars", head="-")["stem.weight"] <= 0.5

    def test_another_network_is_refused(self, net):
        with pytest.raises(ReferenceMismatchError, match=r"stem\.weight"):
            tt.Constraint(net, radius=1.0, reference=nn.Linear(2, 2))

    def test_low_precision_reference_takes_its_rounding_off_the_radius(self, net):
        before = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        constraint = tt.Constraint(net, radius=0.1, reference_dtype=torch.bfloat16)
        constraint.attach(optimizer)
        train(net, optimizer)
        true = true_distances(net, before, "mars", head="-")
        assert max(true.values()) <= 0.1
        for name, distance in constraint.distances().items():
            assert true[name] <= distance.value <= 0.1 * (1 + 1e-12)

    def test_a_reference_too_coarse_for_the_radius_is_refused(self, net):
        with pytest.raises(ConfigurationError, match="reference_dtype"):
            tt.Constraint(net, radius=1e-4, reference_dtype=torch.bfloat16)
        with pytest.raises(ConfigurationError, match="dtype"):
            tt.Constraint(copy.deepcopy(net).bfloat16(), radius=1e-4, reference=net)

    def test_bfloat16_checkpoint_under_float32_weights_is_exact(self, net):
        low = {name: tensor.bfloat16() for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
        net.load_state_dict(low, strict=False)
        constraint = tt.Constraint(net, radius=0.1, reference=low)
        with torch.no_grad():
            net.stem.weight += 1.0
        constraint.project()
        assert true_distances(net, low, "mars", head="-")["stem.weight"] == pytest.approx(0.1, rel=1e-4)


class TestAttach:
    def test_an_infeasible_head_starts_inside_its_ball(self, net):
        with torch.no_grad():
            net.fc.weight += 10.0
        tt.Constraint(net, radius=1.0, head="fc", head_radius=2.0).attach(torch.optim.SGD(net.parameters(), lr=0.1))
        assert float(net.fc.weight.detach().double().abs().sum(1).max()) <= 2.0

    def test_an_optimizer_without_the_parameters_is_refused(self, net):
        with pytest.raises(AttachError, match="fc"):
            tt.Constraint(net, radius=1.0).attach(
                torch.optim.SGD([p for n, p in net.named_parameters() if not n.startswith("fc")], lr=0.1)
            )

    def test_frozen_layers_are_projected_when_attaching_and_need_no_optimizer(self, net):
        before = snapshot(net)
        constraint = tt.Constraint(net, radius=0.5)
        with torch.no_grad():
            net.stem.weight += 1.0
        net.stem.requires_grad_(False)
        constraint.attach(torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1))
        assert true_distances(net, before, "mars", head="-")["stem.weight"] <= 0.5

    def test_each_optimizer_projects_what_it_trains_and_nothing_else(self, net):
        constraint = tt.Constraint(net, radius=0.1)
        body = torch.optim.SGD([p for n, p in net.named_parameters() if not n.startswith("fc")], lr=0.1)
        head = torch.optim.Adam(net.fc.parameters(), lr=0.1)
        constraint.attach(body, head)
        for step, inside, outside in ((head, "fc", "stem"), (body, "stem", "fc")):
            with torch.no_grad():
                net.stem.weight += 1.0
                net.fc.weight += 1.0
            step.step()
            distances = constraint.distances()
            assert distances[f"{inside}.weight"].value <= 0.1 < distances[f"{outside}.weight"].value
        body.add_param_group({"params": [head.param_groups[0]["params"].pop(0)]})
        body.step()
        assert constraint.distances()["fc.weight"].value <= 0.1

    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    @pytest.mark.parametrize("kind", [torch.optim.Adam, tt.optim.Adam])
    def test_optimizers_in_the_backward_pass(self, net, norm, kind):
        before = snapshot(net)
        constraint = tt.Constraint(net, norm=norm, radius=0.1)
        optimizers = [kind([parameter], lr=0.05) for parameter in net.parameters()]
        constraint.attach(*optimizers)

        def stepping(optimizer):
            def step(parameter):
                optimizer.step()
                parameter.grad = None

            return step

        for optimizer in optimizers:
            optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(stepping(optimizer))
        for _ in range(3):
            net(torch.randn(4, 3, 8, 8)).square().sum().backward()
            assert max(true_distances(net, before, norm, head="-").values()) <= 0.1
        assert any(d.active_rows for d in constraint.distances().values())
        planned = [len(balls) for (key, *_), (_, balls) in constraint._plans.items() if key != id(None)]
        assert max(planned) == 1, "every step would look at every layer"

    def test_a_parameter_replaced_after_attaching_is_still_constrained(self, net):
        before = snapshot(net)
        constraint = tt.Constraint(net, radius=0.5)
        net.stem.weight = nn.Parameter(net.stem.weight.detach() + 1.0)  # what fully_shard and Accelerate do
        constraint.project()
        assert true_distances(net, before, "mars", head="-")["stem.weight"] <= 0.5


class TestNonFinite:
    @pytest.mark.parametrize("norm", ["mars", "frobenius"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_the_row_is_left_the_others_are_inside_and_the_error_names_it(self, net, value, norm):
        before = snapshot(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        constraint = tt.Constraint(net, norm=norm, radius=0.05)
        constraint.attach(optimizer)
        with torch.no_grad():
            net.depthwise.weight[3, 0, 1, 1] = value
            net.fc.weight += 1.0
            net.stem.weight += 1.0
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        broken = net.depthwise.weight.detach().clone()
        with pytest.raises(NonFiniteWeightError, match=r"Row 3 of depthwise\.weight"):
            optimizer.step()
        assert torch.equal(net.depthwise.weight[3], broken[3]) or math.isnan(value)
        assert torch.isfinite(net.depthwise.weight).sum() == 71
        distances = true_distances(net, before, norm, head="-")
        assert distances["stem.weight"] <= 0.05
        assert distances["fc.weight"] <= 0.05

    def test_a_broken_reference_is_refused(self, net):
        with torch.no_grad():
            net.stem.weight[0, 0, 0, 0] = math.nan
        with pytest.raises(ConfigurationError, match=r"stem\.weight"):
            tt.Constraint(net, radius=1.0)


class TestState:
    def test_resuming_from_a_fine_tuned_checkpoint_keeps_the_original_centre(self, net, tmp_path):
        original = snapshot(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        constraint = tt.Constraint(net, radius=0.1, head="fc", head_radius=0.3)
        constraint.attach(optimizer)
        train(net, optimizer)
        torch.save({"model": net.state_dict(), "constraint": constraint.state_dict()}, tmp_path / "checkpoint.pt")

        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        resumed = Net()
        resumed.load_state_dict(saved["model"])
        again = tt.Constraint(resumed, radius=99.0, head="fc", reference=original)
        again.load_state_dict(saved["constraint"])
        assert again.distances() == constraint.distances()
        optimizer = torch.optim.Adam(resumed.parameters(), lr=0.05)
        again.attach(optimizer)
        train(resumed, optimizer)
        assert all(
            d <= (0.3 if n.startswith("fc") else 0.1) for n, d in true_distances(resumed, original, "mars").items()
        )

    def test_a_centre_that_is_the_fine_tuned_checkpoint_is_an_error_and_changes_nothing(self, net):
        constraint = tt.Constraint(net, radius=0.1)
        state = constraint.state_dict()
        with torch.no_grad():
            net.stem.weight += 1.0
        wrong = tt.Constraint(net, radius=0.7)
        with pytest.raises(ReferenceMismatchError, match="original"):
            wrong.load_state_dict(state)
        assert {d.radius for d in wrong.distances().values()} == {0.7}

    @pytest.mark.parametrize("radius", [2.0, tt.Relative(0.5), {"stem*": tt.Relative(0.1), "*": 3.0}])
    def test_settings_survive_json(self, net, radius):
        import json

        state = json.loads(json.dumps(tt.Constraint(net, radius=radius).state_dict()))
        other = tt.Constraint(net, radius=9.0)
        other.load_state_dict(state)
        assert other.state_dict() == state

    def test_the_state_holds_no_weights(self, net):
        state = tt.Constraint(net, radius=1.0).state_dict()
        assert len(str(state)) < 1000
