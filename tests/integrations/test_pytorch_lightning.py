"""The callbacks under the package's other name: what is not the same for both names."""

import importlib
import subprocess
import sys
import warnings

import lightning
import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning

from tethertune.errors import MissingExtraError
from tethertune.integrations import lightning as other_name
from tethertune.integrations import pytorch_lightning as ours

torch.set_num_threads(1)

# Lightning's own advice to its users, none of it about what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::UserWarning:tethertune")]

OPTIONS = {"ConstraintCallback": {"radius": 0.05}, "PenaltyCallback": {"strength": 0.1}}


def module(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Linear(6, 3)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    return Module()


def fit(package, folder, callback, epochs, **options):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    usual = {"accelerator": "cpu", "default_root_dir": folder} | dict.fromkeys(off, False)
    trainer = package.Trainer(max_epochs=epochs, callbacks=[callback], **usual)
    trained = module(package)
    trainer.fit(trained, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 4), **options)
    trainer.save_checkpoint(folder / f"{package.__name__}.ckpt")
    return trained.network.weight.detach()


def test_what_is_exported_are_callbacks_of_this_package_and_not_of_the_other():
    assert set(ours.__all__) == set(other_name.__all__) == set(OPTIONS)
    for name, options in OPTIONS.items():
        callback = getattr(ours, name)(**options)
        assert isinstance(callback, pytorch_lightning.Callback)
        assert not isinstance(callback, lightning.Callback)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_begun_under_one_name_goes_on_under_the_other(name, tmp_path):
    def callback(package):
        return getattr(ours if package is pytorch_lightning else other_name, name)(**OPTIONS[name])

    whole = fit(lightning, tmp_path, callback(lightning), epochs=2)
    for first, then in ((pytorch_lightning, lightning), (lightning, pytorch_lightning)):
        fit(first, tmp_path, callback(first), epochs=1)
        checkpoint = tmp_path / f"{first.__name__}.ckpt"
        assert torch.equal(fit(then, tmp_path, callback(then), epochs=2, ckpt_path=checkpoint), whole)


def test_without_the_package_the_message_says_what_to_install_and_where_the_other_name_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "tethertune.integrations.pytorch_lightning")
    with pytest.raises(
        MissingExtraError, match=r"pip install pytorch_lightning\. .*tethertune\.integrations\.lightning"
    ):
        importlib.import_module("tethertune.integrations.pytorch_lightning")


def test_it_needs_this_package_alone():
    program = """
import sys
sys.modules["lightning"] = None
from tethertune.integrations.pytorch_lightning import ConstraintCallback
print(ConstraintCallback(radius=0.1).constraint)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr
