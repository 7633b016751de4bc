"""The hooks as Lightning calls them: when they take the reference, when they log, and what a checkpoint keeps."""

import copy
import csv

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import tethertune as tt
from tethertune.errors import ReferenceMismatchError
from tethertune.integrations.hooks import ConstraintHooks, PenaltyHooks
from tethertune.integrations.tether import measure_constraint, measure_penalty

torch.set_num_threads(1)

# Lightning's own advice to its users, none of it about what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::UserWarning:tethertune")]

RADIUS = 0.05


class Constrained(ConstraintHooks, lightning.Callback):
    """What a package's own callback is."""


class Penalised(PenaltyHooks, lightning.Callback):
    """What a package's own callback is."""


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, _):
        return self.training_step(batch, _)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(24, 6, generator=generator), torch.randint(0, 3, (24,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 4)


class Witness(lightning.Callback):
    """Measures after each step, before the hooks' logging of it."""

    def __init__(self, measure):
        self.measure, self.seen = measure, []

    def on_train_batch_end(self, *_):
        self.seen.append(self.measure())


def trainer(folder, *callbacks, **options):
    usual = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        default_root_dir=folder, callbacks=[*callbacks], logger=CSVLogger(folder, "", ""), **usual | options
    )


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", ["constraint", "penalty"])
@pytest.mark.parametrize("log", ["summary", "layers", "off"])
def test_what_is_measured_is_logged_at_the_steps_at_which_the_trainer_logs(kind, log, batches, tmp_path):
    if kind == "constraint":
        hooks = Constrained(radius=0.4, log=log)
        witness = Witness(lambda: measure_constraint(hooks.constraint, log))
    else:
        hooks = Penalised(strength=0.1, log=log)
        witness = Witness(lambda: measure_penalty(hooks.penalty, log))
    fitted = trainer(tmp_path, witness, hooks, log_every_n_steps=2, limit_train_batches=5)
    fitted.fit(Module(), batches)
    if log == "off":
        assert not (tmp_path / "metrics.csv").exists()
        return
    rows = logged(tmp_path)
    assert [row.pop("step") for row in rows] == [1, 3]
    for row, seen in zip(rows, witness.seen[1::2], strict=True):
        assert {k: v for k, v in row.items() if k != "epoch"} == pytest.approx(seen, rel=1e-5)
    last = {key: float(value) for key, value in fitted.callback_metrics.items()}
    assert last == pytest.approx(witness.seen[3], rel=1e-5), "measured for nothing at a step that is not logged"


def test_nothing_is_built_without_a_training_and_the_reference_is_the_module_before_it(batches, tmp_path):
    module, hooks = Module(), Constrained(radius=RADIUS)
    start = copy.deepcopy(module.state_dict())
    assert hooks.constraint is None
    assert hooks.state_dict() == {}
    with torch.no_grad():
        module.network[0].weight.mul_(2)
    trainer(tmp_path, hooks).validate(module, batches)
    assert hooks.constraint is None
    module.load_state_dict(start)
    trainer(tmp_path, hooks).fit(module, batches)
    assert isinstance(hooks.constraint, tt.Constraint)
    moved = module.network[0].weight.detach().double() - start["network.0.weight"].double()
    assert 0.99 * RADIUS < float(moved.abs().sum(1).max()) <= RADIUS


@pytest.mark.parametrize(("make", "options"), [(Constrained, {"radius": RADIUS}), (Penalised, {"strength": 0.1})])
def test_a_checkpoint_keeps_what_the_constraint_or_penalty_says_of_itself(make, options, batches, tmp_path):
    hooks = make(**options)
    trained = trainer(tmp_path, hooks)
    trained.fit(Module(), batches)
    trained.save_checkpoint(tmp_path / "kept.ckpt")
    (kept,) = (
        state
        for key, state in torch.load(tmp_path / "kept.ckpt", weights_only=True)["callbacks"].items()
        if make.__name__ in key
    )
    built = hooks.constraint if make is Constrained else hooks.penalty
    assert kept == built.state_dict()
    assert kept == hooks.state_dict()


def test_what_one_checkpoint_said_is_forgotten_before_the_next_is_loaded(batches, tmp_path):
    for name, callbacks in (("with", [Constrained(radius=RADIUS)]), ("without", [])):
        trained = trainer(tmp_path / name, *callbacks)
        trained.fit(Module(), batches)
        trained.save_checkpoint(tmp_path / f"{name}.ckpt")
    hooks = Constrained(radius=RADIUS)
    trainer(tmp_path, hooks, max_epochs=2).fit(Module(), batches, ckpt_path=tmp_path / "with.ckpt")
    with pytest.raises(ReferenceMismatchError, match="saved without this constraint"):
        trainer(tmp_path, hooks, max_epochs=2).fit(Module(), batches, ckpt_path=tmp_path / "without.ckpt")


def test_a_second_training_of_one_module_stays_around_the_first_reference(batches, tmp_path):
    module, hooks = Module(), Constrained(radius=RADIUS)
    start = module.network[0].weight.detach().clone()
    trainer(tmp_path, hooks).fit(module, batches)
    first = hooks.constraint
    again = trainer(tmp_path, hooks)
    again.fit(module, batches)
    assert hooks.constraint is first
    assert len(again.optimizers[0]._optimizer_step_post_hooks) == 1
    assert float((module.network[0].weight.detach().double() - start.double()).abs().sum(1).max()) <= RADIUS
