"""LoRA as peft makes it: the update that merging adds is inside its ball, and what is not s·B·A is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers.pytorch_utils import Conv1D

import tethertune as tt
from tethertune import adapters, norms, rows
from tethertune.adapters import AdaptedLayer
from tethertune.errors import ConfigurationError, NonFiniteWeightError, PatternError, ReferenceMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RADIUS = 0.1
BOTH = pytest.mark.parametrize("norm", ["mars", "frobenius"])


class Network(nn.Module):
    """One layer of each kind that peft adapts."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 12)
        self.linear = nn.Linear(12, 20)
        self.conv1d = Conv1D(24, 20)
        self.conv = nn.Conv2d(6, 5, 3, padding=1)
        self.pointwise = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        x = self.conv1d(torch.relu(self.linear(self.tokens(ids)))).mean(dim=1).view(-1, 6, 2, 2)
        return self.head(self.pointwise(torch.relu(self.conv(x))).flatten(1))


KINDS = ["tokens", "linear", "conv1d", "conv", "pointwise"]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return Network().to(dtype)


def adapted(targets=tuple(KINDS), *, net=None, **options):
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    usual = {"r": 4, "lora_alpha": 8, "modules_to_save": ["head"]}
    config = peft.LoraConfig(target_modules=list(targets), **usual | options)
    return peft.get_peft_model(network() if net is None else net, config)


def stir(model, scale=1.0):
    """Move every factor far away, as no training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.add_(noise.to(parameter.dtype))


def module_of(layer):
    return layer.name.removeprefix("base_model.model.").removesuffix(".weight")


def update(layer):
    """s·B·A as rows, in float64 and from the stored factors, rank by rank in the other order."""
    T = 0
    for name in layer.module.active_adapters:
        if len(layer.module.lora_embedding_A):
            B, A = layer.module.lora_embedding_A[name].t(), layer.module.lora_embedding_B[name].t()
        else:
            B, A = layer.module.lora_B[name].weight, layer.module.lora_A[name].weight
        B, A = B.detach().double().flatten(1), A.detach().double().flatten(1)
        for k in reversed(range(B.shape[1])):
            T = T + B[:, k, None] * A[k] * layer.module.scaling[name]
    return T


def measure(T, norm):
    return float(norms.mars(T) if norm == "mars" else norms.frobenius(T))


def adapted_layers(constraint):
    return [ball.layer for ball in constraint._balls if isinstance(ball.layer, AdaptedLayer)]


def inside(constraint, norm, radius=RADIUS):
    shares = {layer.name: measure(update(layer), norm) / radius for layer in adapted_layers(constraint)}
    assert shares
    assert max(shares.values()) <= 1, shares
    return shares


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": False, "lora_alpha": 3}])
def test_the_update_of_every_kind_of_layer_is_inside_and_projecting_again_changes_no_bit(norm, dtype, options):
    model = adapted(net=network(), **options)
    model = model.to(dtype)
    constraint = tt.Constraint(model, norm=norm, radius=RADIUS, include=["*.tokens.weight"], exclude=["*.head*"])
    assert {module_of(layer) for layer in adapted_layers(constraint)} == set(KINDS)
    stir(model)
    fixed = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n or "embedding_B" in n}
    constraint.project()
    least = 0.9 if dtype is not torch.float32 else 1 - 1e-6
    assert all(share > least for share in inside(constraint, norm).values())
    once = copy.deepcopy(model.state_dict())
    constraint.project()
    assert all(torch.equal(once[name], value) for name, value in model.state_dict().items())
    for name, before in fixed.items():
        assert torch.equal(before, model.get_parameter(name)), f"{name} is not to be scaled"
    for name, distance in constraint.distances().items():
        layer = next(la for la in adapted_layers(constraint) if la.name == name)
        assert distance.value == pytest.approx(measure(update(layer), norm), rel=1e-12)
        assert distance.value <= distance.radius == RADIUS
        assert distance.rows == len(update(layer))
        assert distance.active_rows >= (distance.rows if dtype == torch.float32 else 0.9 * distance.rows)


def test_rows_inside_keep_their_bits_and_others_their_direction():
    model = adapted(["linear"])
    constraint = tt.Constraint(model, radius=RADIUS)
    (layer,) = adapted_layers(constraint)
    stir(model)
    with torch.no_grad():
        layer.weight[::2] *= 1e-3
    before, B = update(layer), layer.weight.clone()
    was_inside = norms.row_sums(before) <= RADIUS
    assert was_inside.any()
    assert not was_inside.all()
    constraint.project()
    assert torch.equal(layer.weight[was_inside], B[was_inside])
    after = update(layer)[~was_inside]
    expected = before[~was_inside] * (RADIUS / norms.row_sums(before[~was_inside])).unsqueeze(1)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_scale_and_no_cancellation_gets_an_update_outside(norm, dtype):
    """Factors of any size, and rows of B in which what A has almost twice nearly cancels."""
    generator = torch.Generator().manual_seed(3)
    worst = 0.0
    for number in range(24):
        model = adapted(["linear"]).to(dtype)
        (layer,) = adapted_layers(tt.Constraint(model, norm=norm, radius=1.0))
        radius = float(10.0 ** torch.randint(-4, 3, (), generator=generator))
        A, B = layer.module.lora_A["default"].weight, layer.module.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(
                torch.randn(A.shape, generator=generator) * 10.0 ** float(torch.randint(-2, 3, (), generator=generator))
            )
            B.copy_(torch.randn(B.shape, generator=generator))
            if number % 2:
                A[1], B[:, 1] = A[0] * (1 + 2**-6), -B[:, 0]
                A[2:] *= 1e-3
        constraint = tt.Constraint(model, norm=norm, radius=radius, exclude=["*.head*"])
        start = norms.row_sums(update(layer)) if norm == "mars" else measure(update(layer), norm)
        constraint.project()
        T = update(layer)
        assert measure(T, norm) <= radius
        worst = max(worst, measure(T, norm) / radius if bool(torch.as_tensor(start > radius).any()) else 0.0)
        once = B.clone()
        constraint.project()
        assert torch.equal(once, B)
    assert worst > 0.95


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_weight_is_inside_up_to_the_rounding_of_merging(norm, dtype):
    """And exactly inside once it is projected in its own dtype."""
    model = adapted(net=network(dtype))
    start = {name: weight.clone() for name, weight in network(dtype).state_dict().items()}
    constraint = tt.Constraint(model, norm=norm, radius=RADIUS, include=["*.tokens.weight"])
    stir(model)
    constraint.project()
    bounds = {}
    for layer in adapted_layers(constraint):
        unit = torch.finfo(dtype).eps / 2
        W, T = start[f"{module_of(layer)}.weight"].double(), update(layer)
        factors = layer.factors()
        absolute = sum(b.double().abs() @ a.double().abs() * s for b, a, s in factors)
        ranks = sum(a.shape[0] for _, a, _ in factors)
        error = unit * (rows.view(W, getattr(network(), module_of(layer))).abs() + 2 * T.abs())
        error += (ranks + 3) * max(unit, torch.finfo(torch.float32).eps) * absolute.view_as(T)
        bounds[module_of(layer)] = measure(error, norm)
    merged = model.merge_and_unload()
    for name, bound in bounds.items():
        module = merged.get_submodule(name)
        T = rows.view(module.weight.detach().double() - start[f"{name}.weight"].double(), module)
        assert 0.9 * RADIUS < measure(T, norm) <= RADIUS + bound, name
    exact = tt.Constraint(merged, norm=norm, radius=RADIUS, include=["tokens"], exclude=["head"], reference=start)
    exact.project()
    assert max(d.value for d in exact.distances().values()) <= RADIUS


def test_training_a_language_model_of_adapters_keeps_the_promise_at_every_step():
    model = adapted()
    constraint = tt.Constraint(model, radius=RADIUS, head="base_model.model.head", head_radius=0.5)
    assert "base_model.model.head.original_module.weight" not in [layer.name for layer in constraint._layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    constraint.attach(optimizer)
    shares = []
    ids = torch.randint(0, 11, (16, 5), generator=torch.Generator().manual_seed(4))
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), ids[:, 0] % 3).backward()
        optimizer.step()
        shares.append(max(inside(constraint, "mars").values()))
        head = model.base_model.model.head.modules_to_save["default"].weight
        assert float(norms.mars(head.detach())) <= 0.5
    assert max(shares) > 0.999
    summary = constraint.summary()
    assert summary.startswith("5 of 11 tensors constrained, head base_model.model.head, norm mars, 5 at their radius")
    assert "1 embedding" in summary


@BOTH
def test_two_active_adapters_share_one_ball(norm):
    model = adapted(["linear"], modules_to_save=None)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=1, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    constraint = tt.Constraint(model, norm=norm, radius=RADIUS)
    stir(model)
    constraint.project()
    assert min(inside(constraint, norm).values()) > 0.999
    (layer,) = adapted_layers(constraint)
    merged = model.merge_and_unload(adapter_names=["default", "other"]).linear.weight
    torch.testing.assert_close((merged - network().linear.weight).double(), update(layer), rtol=1e-3, atol=1e-6)


def test_an_inactive_adapter_is_left_alone_and_frozen_ones_beside_trained_ones_are_refused():
    model = adapted(["linear"], modules_to_save=None)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["linear"]))
    constraint = tt.Constraint(model, radius=RADIUS)
    stir(model)
    other = model.base_model.model.linear.lora_B["other"].weight.clone()
    constraint.project()
    assert torch.equal(other, model.base_model.model.linear.lora_B["other"].weight)
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "default" in name)
    with pytest.raises(ConfigurationError, match="in part frozen"):
        constraint.project()


def _other(config):
    return peft.get_peft_model(network(), config)


def _unfrozen(model):
    model.base_model.model.linear.base_layer.weight.requires_grad_()
    return model


def _attention():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["attention"]))


def _grouped():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: adapted(["linear"], use_dora=True), "variant DoraLinear"),
        (lambda: adapted(["linear"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda: adapted(["linear"], init_lora_weights="olora"), "init_lora_weights='olora'"),
        (lambda: _other(peft.IA3Config(target_modules=["linear"], feedforward_modules=[])), "adapted by Linear, whose"),
        (lambda: _other(peft.LoHaConfig(target_modules=["linear"], r=2)), "not a product of two factors"),
        (lambda: _other(peft.AdaLoraConfig(target_modules=["linear"], total_step=9)), "not a product of two factors"),
        (lambda: _other(peft.OFTConfig(target_modules=["linear"], oft_block_size=2)), "not a product of two factors"),
        (lambda: adapted(["linear", "head"], modules_to_save=None), "train the head whole"),
        (lambda: _unfrozen(adapted(["linear"])), "trained itself and adapted"),
        (_attention, "does not keep the adapted weight as a matrix"),
        (_grouped, "grouped convolution"),
    ],
)
def test_an_update_that_is_not_a_product_is_refused_with_the_reason(make, why):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    options = {"head": "base_model.model.head", "head_radius": 1.0} if hasattr(model.base_model.model, "head") else {}
    with pytest.raises(ConfigurationError, match=why):
        tt.Constraint(model, radius=RADIUS, **options)


def test_a_refused_layer_can_be_left_out():
    model = adapted(["linear", "conv1d"], use_dora=False)
    dora = peft.LoraConfig(r=4, target_modules=["linear"], use_dora=True)
    model.add_adapter("dora", dora)
    with pytest.raises(ConfigurationError, match="exclude= it"):
        tt.Constraint(model, radius=RADIUS)
    constraint = tt.Constraint(model, radius=RADIUS, exclude=["*.linear.weight"])
    assert {module_of(layer) for layer in adapted_layers(constraint)} == {"conv1d"}


def test_factors_have_no_balls_of_their_own():
    with pytest.raises(PatternError, match="lora_A"):
        tt.Constraint(adapted(["linear"]), radius=RADIUS, include=["*lora_A*"])


def test_radii_by_name_and_relative_to_the_frozen_weight():
    model = adapted(["linear", "conv1d"])
    radius = {"*.linear.weight": tt.Relative(0.05), "*.conv1d.weight": 0.2, "*.head*.weight": 0.3}
    distances = tt.Constraint(model, radius=radius).distances()
    net = network()
    expected = 0.05 * float(norms.mars(net.linear.weight.detach()))
    assert distances["base_model.model.linear.weight"].radius == pytest.approx(expected, rel=1e-12)
    assert distances["base_model.model.conv1d.weight"].radius == 0.2
    assert distances["base_model.model.conv1d.weight"].rows == 24
    assert distances["base_model.model.head.modules_to_save.default.weight"].radius == 0.3
    assert len(distances) == 3, "what is frozen beside adapters needs no ball, and no copy of its weights"
    by_norm = tt.Constraint(model, radius={"*.conv1d.weight": tt.Relative(0.05)}).distances()
    expected = 0.05 * float(norms.mars(net.conv1d.weight.detach().t()))
    assert by_norm["base_model.model.conv1d.weight"].radius == pytest.approx(expected, rel=1e-12)


def test_zero_freezes_the_update():
    model = adapted(["linear"])
    constraint = tt.Constraint(model, radius=0.0, exclude=["*.head*"])
    stir(model)
    constraint.project()
    assert not model.base_model.model.linear.lora_B["default"].weight.any()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@BOTH
def test_a_factor_that_is_not_finite_is_left_and_raises(norm, factor):
    model = adapted(["linear"])
    constraint = tt.Constraint(model, norm=norm, radius=RADIUS)
    stir(model)
    weight = getattr(model.base_model.model.linear, factor)["default"].weight
    with torch.no_grad():
        weight[3, 1] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"base_model\.model\.linear\.weight"):
        constraint.project()
    assert weight[3, 1].isnan()


def test_resuming_checks_the_frozen_weights():
    constraint = tt.Constraint(adapted(["linear"]), radius=RADIUS)
    again = adapted(["linear"])
    stir(again)
    tt.Constraint(again, radius=RADIUS).load_state_dict(constraint.state_dict())
    with torch.no_grad():
        again.base_model.model.linear.base_layer.weight[0, 0] += 1
    with pytest.raises(ReferenceMismatchError):
        tt.Constraint(again, radius=RADIUS).load_state_dict(constraint.state_dict())


@BOTH
def test_the_bits_do_not_depend_on_the_number_of_threads(norm):
    """DDP replicas with different numbers of threads stay equal."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(600, 700, bias=False))
        model = peft.get_peft_model(net, peft.LoraConfig(r=16, target_modules=["0"]))
        stir(model)
        tt.Constraint(model, norm=norm, radius=RADIUS).project()
        results.append(model.base_model.model[0].lora_B["default"].weight.clone())
    torch.set_num_threads(1)
    assert torch.equal(*results)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_look_from_the_host_the_bits_are_the_same(norm, dtype, monkeypatch):
    """What runs on accelerators, on a CPU."""
    results = []
    for looks in (True, False):
        monkeypatch.setattr(adapters, "_host_looks", lambda _, looks=looks: looks)
        model = adapted().to(dtype)
        stir(model)
        with torch.no_grad():
            model.base_model.model.linear.lora_B["default"].weight[::2] *= 1e-3
        tt.Constraint(model, norm=norm, radius=RADIUS, include=["*.tokens.weight"], exclude=["*.head*"]).project()
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_balls_fit_a_copy_of_the_network():
    model = adapted(["linear"])
    constraint = tt.Constraint(model, radius=RADIUS)
    average = copy.deepcopy(model)
    stir(average)
    held = constraint.on(average)
    held.project()
    assert inside(held, "mars")
    assert measure(update(adapted_layers(constraint)[0]), "mars") == 0


def test_a_penalty_says_that_it_is_not_for_adapters():
    with pytest.raises(ConfigurationError, match="adapters"):
        tt.Penalty(adapted(["linear"]), strength=0.1)
