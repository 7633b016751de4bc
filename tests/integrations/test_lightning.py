"""Lightning under both its names, and Fabric: real trainings, interrupted and resumed from their checkpoints."""

import copy
import warnings

import lightning
import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning

import tethertune as tt
from tethertune import norms
from tethertune.errors import AttachError, ConfigurationError, ReferenceMismatchError
from tethertune.integrations import lightning as ours
from tethertune.integrations import pytorch_lightning as ours_too

# Lightning's own advice to its users, none of it about what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::UserWarning:tethertune")]

RADIUS, HEAD_RADIUS = 0.05, 0.3
BOTH = pytest.mark.parametrize(
    ("package", "callbacks"), [(lightning, ours), (pytorch_lightning, ours_too)], ids=["lightning", "pytorch_lightning"]
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.ReLU()).append(
        nn.Linear(8, 3)
    )


START = network().state_dict()


def batches(count=8, size=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 3, 4, 4, generator=generator)
    data = torch.utils.data.TensorDataset(x, torch.randint(0, 3, (count * size,), generator=generator))
    return torch.utils.data.DataLoader(data, size)


def promise(model, radius=RADIUS, head_radius=HEAD_RADIUS):
    """The distances as shares of their radii, in float64, without the constraint's own measure."""
    shares = []
    for name in ("0.weight", "3.weight", "5.weight"):
        weight = model.get_parameter(name).detach().double()
        centre = torch.zeros_like(weight) if name == "5.weight" else START[name].double()
        bound = head_radius if name == "5.weight" else radius
        shares.append(float(norms.mars((weight - centre).flatten(1))) / bound)
    return shares


def module_class(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()
            self.shares = []

        def training_step(self, batch, _):
            if self.trainer.global_step:
                self.shares.append(promise(self.network))
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

    return Module


def trainer(package, folder, *callbacks, epochs=3, **options):
    usual = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return package.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[*callbacks],
        **{"logger": package.pytorch.loggers.CSVLogger(folder) if package is lightning else csv(folder)}
        | usual
        | options,
    )


def csv(folder):
    from pytorch_lightning.loggers import CSVLogger

    return CSVLogger(folder)


def constraint_of(callbacks, **options):
    usual = {"radius": RADIUS, "head": "network.5", "head_radius": HEAD_RADIUS}
    return callbacks.ConstraintCallback(**usual | options)


@BOTH
def test_every_step_is_inside_and_resumed_equals_uninterrupted(package, callbacks, tmp_path):
    data = batches()
    whole = module_class(package)()
    tether = constraint_of(callbacks, log="layers")
    trainer(package, tmp_path / "whole", tether, accumulate_grad_batches=2).fit(whole, data)
    assert len(whole.shares) >= 10
    assert all(max(shares) <= 1 for shares in [*whole.shares, promise(whole.network)])
    assert max(promise(whole.network)) > 0.99, "nothing was outside, so nothing was tested"
    logged = (tmp_path / "whole/lightning_logs/version_0/metrics.csv").read_text()
    assert "tether/largest_share" in logged
    assert "distance/network.0.weight" in logged
    distances = tether.constraint.distances()
    assert distances["network.5.weight"].role == "head"

    first = trainer(package, tmp_path / "part", constraint_of(callbacks), epochs=1, accumulate_grad_batches=2)
    first.fit(module_class(package)(), data)
    resumed, tether = module_class(package)(), constraint_of(callbacks)
    checkpoint = next((tmp_path / "part").rglob("*.ckpt"))
    again = trainer(package, tmp_path / "rest", tether, accumulate_grad_batches=2)
    again.fit(resumed, data, ckpt_path=checkpoint)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, resumed.network.state_dict()[name]), name
    assert {n: d.value for n, d in tether.constraint.distances().items()} == {n: d.value for n, d in distances.items()}


def test_a_checkpoint_of_another_reference_other_options_or_without_the_callback_is_refused(tmp_path):
    data, Module = batches(2), module_class(lightning)
    trainer(lightning, tmp_path / "with", constraint_of(ours), epochs=1).fit(Module(), data)
    trainer(lightning, tmp_path / "without", epochs=1).fit(Module(), data)
    with_it, without = (next((tmp_path / name).rglob("*.ckpt")) for name in ("with", "without"))

    trained = Module()
    trained.load_state_dict(torch.load(with_it, weights_only=True)["state_dict"])
    with pytest.raises(ReferenceMismatchError, match="original pre-trained"):
        trainer(lightning, tmp_path, constraint_of(ours)).fit(trained, data, ckpt_path=with_it)
    original = {f"network.{name}": weight for name, weight in START.items()}
    trainer(lightning, tmp_path, constraint_of(ours, reference=original)).fit(trained, data, ckpt_path=with_it)
    assert max(promise(trained.network)) <= 1

    with pytest.raises(ConfigurationError, match=r"radius=0\.05, this constraint has 0\.1"):
        trainer(lightning, tmp_path, constraint_of(ours, radius=0.1)).fit(Module(), data, ckpt_path=with_it)
    with pytest.raises(ReferenceMismatchError, match="saved without this constraint"):
        trainer(lightning, tmp_path, constraint_of(ours)).fit(Module(), data, ckpt_path=without)


@BOTH
def test_the_penalty_equals_one_in_the_loss(package, callbacks, tmp_path):
    class Module(module_class(package)):
        penalty = None

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss if self.penalty is None else loss + self.penalty()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = batches(4)
    options = {"strength": 0.05, "head_strength": 0.01}
    by_hand = Module()
    by_hand.penalty = tt.Penalty(by_hand, head="network.5", **options)
    trainer(package, tmp_path, epochs=1).fit(by_hand, data)

    module = Module()
    tether = callbacks.PenaltyCallback(head="network.5", **options)
    trainer(package, tmp_path / "ours", tether, epochs=1).fit(module, data)
    for name, weight in by_hand.network.state_dict().items():
        torch.testing.assert_close(module.network.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    assert float(tether.penalty()) > 0
    assert "tether/penalty" in (tmp_path / "ours/lightning_logs/version_0/metrics.csv").read_text()


def test_several_optimisers_mixed_precision_and_manual_optimisation(tmp_path):
    class Manual(module_class(lightning)):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.network[:4].parameters(), lr=0.5),
                torch.optim.Adam(self.network[4:].parameters(), lr=0.05),
            ]

    module = Manual()
    trainer(lightning, tmp_path, constraint_of(ours), epochs=1, precision="bf16-mixed").fit(module, batches())
    assert all(max(shares) <= 1 for shares in [*module.shares, promise(module.network)])
    assert sum(share > 0.99 for share in promise(module.network)) >= 2


def test_a_model_that_is_made_in_configure_model_is_tethered_from_then_on(tmp_path):
    class Late(module_class(lightning)):
        def __init__(self):
            super().__init__()
            self.network = None

        def configure_model(self):
            if self.network is None:
                self.network = network()

    module, data = Late(), batches(2)
    trainer(lightning, tmp_path, constraint_of(ours), epochs=1).fit(module, data)
    assert max(promise(module.network)) <= 1
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    with pytest.raises(ReferenceMismatchError, match="has not seen the pre-trained"):
        trainer(lightning, tmp_path, constraint_of(ours)).fit(Late(), data, ckpt_path=checkpoint)


def test_an_optimiser_that_cannot_carry_the_constraint_is_refused_at_the_start(tmp_path):
    class Headless(module_class(lightning)):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network[:4].parameters(), lr=0.1)

    with pytest.raises(AttachError, match=r"network\.5\.weight"):
        trainer(lightning, tmp_path, constraint_of(ours), epochs=1).fit(Headless(), batches(1))


def test_fabric_needs_no_callback(tmp_path):
    """The loop of Fabric's own introduction, with the three lines of any loop."""

    def run(fabric, model, optimizer, data):
        for image, label in data:
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(image), label))
            optimizer.step()
            assert max(promise(model.module)) <= 1

    def prepared():
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        model = network()
        constraint = tt.Constraint(model, radius=RADIUS, head="5", head_radius=HEAD_RADIUS)
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.02))
        constraint.attach(optimizer)
        return fabric, model, optimizer, constraint

    data = list(batches(6))
    fabric, model, optimizer, constraint = prepared()
    run(fabric, model, optimizer, data[:3])
    state = {"model": model, "optimizer": optimizer, "constraint": constraint.state_dict()}
    fabric.save(tmp_path / "state.ckpt", state)
    run(fabric, model, optimizer, data[3:])
    final = copy.deepcopy(model.state_dict())
    assert max(promise(model.module)) > 0.99

    fabric, model, optimizer, constraint = prepared()
    state = {"model": model, "optimizer": optimizer, "constraint": {}}
    fabric.load(tmp_path / "state.ckpt", state)
    constraint.load_state_dict(state["constraint"])
    run(fabric, model, optimizer, data[3:])
    assert all(torch.equal(weight, final[name]) for name, weight in model.state_dict().items())
