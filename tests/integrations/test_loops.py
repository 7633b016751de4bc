"""Loops that are one's own: plain PyTorch, Accelerate, and timm's train.py, each with three lines more.

Each trains on the real digits of scikit-learn, saves in its own way, is made anew from the pre-trained weights, resumes
and ends with the bits of a training that was not interrupted; the promise is verified in float64 at every step.
"""

import argparse
import copy

import pytest
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sklearn.datasets import load_digits
from torch import nn

import tethertune as tt
from tethertune import norms, rows
from tethertune.errors import ReferenceMismatchError

STEPS, SAVED = 10, 5
RADIUS, HEAD_RADIUS = 0.2, 1.0


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return torch.utils.data.TensorDataset(x, torch.tensor(labels))


@pytest.fixture(scope="module")
def pretrained(digits):
    """A network that has learnt to tell small digits from large ones."""
    torch.manual_seed(0)
    model = network()
    x, y = digits.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for part in range(10):
        optimizer.zero_grad()
        chosen = slice(64 * part, 64 * part + 64)
        nn.functional.cross_entropy(model(x[chosen]), (y[chosen] > 4).long()).backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def fresh(pretrained):
    """The pre-trained body with a new head, as one would begin."""
    torch.manual_seed(1)
    model = network()
    model.load_state_dict({k: v for k, v in pretrained.items() if not k.startswith("6.")}, strict=False)
    return model


def promise(model, start, head, norm="mars", radius=RADIUS, head_radius=HEAD_RADIUS):
    """The largest distance as a share of its radius, in float64, without the constraint's own measure."""
    shares = []
    for layer in rows.layers(model, head=head):
        if layer.rows.kind == "map":
            weight = layer.weight.detach().double()
            centre = torch.zeros_like(weight) if layer.role == "head" else start[layer.name].double()
            T = layer.rows.matrix(weight - centre)
            value = float(norms.mars(T) if norm == "mars" else norms.frobenius(T))
            shares.append(value / (head_radius if layer.role == "head" else radius))
    return max(shares)


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, tt.optim.AdamW], ids=["sgd", "adamw", "fused"])
def test_plain_pytorch(norm, make, digits, pretrained, tmp_path):
    def prepared():
        model = fresh(pretrained)
        constraint = tt.Constraint(model, norm=norm, radius=RADIUS, head="6", head_radius=HEAD_RADIUS)
        optimizer = make(model.parameters(), lr=0.02)
        constraint.attach(optimizer)
        return model, optimizer, constraint

    def train(model, optimizer, first, last):
        shares = []
        for step in range(first, last):
            x, y = (t[32 * step : 32 * step + 32] for t in digits.tensors)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            shares.append(promise(model, pretrained, "6", norm))
        assert max(shares) <= 1
        return shares

    model, optimizer, constraint = prepared()
    train(model, optimizer, 0, SAVED)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "tether": constraint.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    shares = train(model, optimizer, SAVED, STEPS)
    assert max(shares) > (0.99 if make is not torch.optim.SGD else 0.5)
    whole = model.state_dict()

    model, optimizer, constraint = prepared()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    constraint.load_state_dict(state["tether"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, SAVED, STEPS)
    assert same(whole, model.state_dict())
    with pytest.raises(ReferenceMismatchError):
        tt.Constraint(model, norm=norm, radius=RADIUS, head="6", head_radius=HEAD_RADIUS).load_state_dict(
            state["tether"]
        )


@pytest.fixture
def _new_accelerator():
    """Accelerate's settings are the process's: without those of another test, and without ours in the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_new_accelerator")
@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_accelerate(norm, digits, pretrained, tmp_path):
    """With accumulation over two batches, bf16 and a scheduler; saved by ``save_state``, the tether among it."""

    def prepared():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
        model = fresh(pretrained)
        constraint = tt.Constraint(model, norm=norm, radius=RADIUS, head="6", head_radius=HEAD_RADIUS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        loader = torch.utils.data.DataLoader(digits, batch_size=16)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        constraint.attach(optimizer)
        accelerator.register_for_checkpointing(constraint)
        return accelerator, model, optimizer, loader, scheduler

    def train(accelerator, model, optimizer, loader, scheduler, first, last):
        shares = []
        for number, (x, y) in enumerate(loader):
            if not 2 * first <= number < 2 * last:
                continue
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            shares.append(promise(accelerator.unwrap_model(model), pretrained, "6", norm))
        assert max(shares) <= 1
        return shares

    whole = prepared()
    train(*whole, 0, SAVED)
    whole[0].save_state(str(tmp_path / "state"))
    assert max(train(*whole, SAVED, STEPS)) > 0.99

    resumed = prepared()
    resumed[0].load_state(str(tmp_path / "state"))
    train(*resumed, SAVED, STEPS)
    assert same(whole[1].state_dict(), resumed[1].state_dict())


def test_the_loop_of_timms_train_py(digits, tmp_path):
    """Its optimiser and scheduler factories, its average of weights, its saver and its way to resume."""
    x, y = digits.tensors[0].expand(-1, 3, 8, 8), digits.tensors[1]

    def made():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=10)

    start = {name: value.clone() for name, value in made().state_dict().items()}

    def prepared():
        model = made()
        constraint = tt.Constraint(model, radius=RADIUS, head="fc", head_radius=HEAD_RADIUS)
        optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=0.01, weight_decay=0.05)
        constraint.attach(optimizer)
        average = timm.utils.ModelEmaV3(model, decay=0.8)
        scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=4)
        return model, optimizer, constraint, average, scheduler

    def train_one_epoch(epoch, model, optimizer, constraint, average, scheduler):
        model.train()
        for step in range(3 * epoch, 3 * epoch + 3):
            chosen = slice(16 * step, 16 * step + 16)
            loss = nn.functional.cross_entropy(model(torch.nn.functional.interpolate(x[chosen], size=32)), y[chosen])
            optimizer.zero_grad()
            loss.backward(create_graph=False)
            timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
            average.update(model)
            assert promise(model, start, "fc") <= 1
        scheduler.step(epoch + 1)
        held = constraint.on(average.module)
        held.project()
        assert promise(average.module, start, "fc") <= 1

    whole = prepared()
    args = argparse.Namespace(model="test_resnet")
    saver = timm.utils.CheckpointSaver(whole[0], whole[1], args=args, model_ema=whole[3], checkpoint_dir=str(tmp_path))
    saver.checkpoint_dir = saver.recovery_dir = str(tmp_path)
    for epoch in range(4):
        train_one_epoch(epoch, *whole)
        if epoch == 1:
            saver.save_checkpoint(epoch, metric=0.0)
            tether = whole[2].state_dict()
    assert promise(whole[0], start, "fc") > 0.99

    resumed = prepared()
    resumed[2].load_state_dict(tether)
    checkpoint = str(tmp_path / "last.pth.tar")
    first = timm.models.resume_checkpoint(resumed[0], checkpoint, optimizer=resumed[1], log_info=False)
    timm.models.load_checkpoint(resumed[3].module, checkpoint, use_ema=True)
    resumed[4].step(first)
    for epoch in range(first, 4):
        train_one_epoch(epoch, *resumed)
    assert same(whole[0].state_dict(), resumed[0].state_dict())
    assert same(whole[3].module.state_dict(), resumed[3].module.state_dict())
