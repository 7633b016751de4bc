"""The Trainers with DDP and FSDP2, and sharded adapters, on two gloo ranks. This file is also the program they run."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

CHECKS = {
    "transformers": ["ddp", "fsdp", "sharded_adapters", "loaded_on_the_first_rank_alone"],
    "lightning": ["ddp", "model_parallel"],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank found in each check; each package is imported once, before the ranks part."""
    found = {}
    for package in CHECKS:
        folder = tmp_path_factory.mktemp(package)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", __file__, package, str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
        files = [folder / f"rank-{rank}.json" for rank in range(2)]
        assert all(file.exists() for file in files), result.stdout + result.stderr
        found[package] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("package", "check"), [(package, check) for package in CHECKS for check in CHECKS[package]])
def test_on_two_ranks(package, check, outcomes):
    for rank, outcome in enumerate(outcomes[package]):
        assert outcome[check] == "passed", f"rank {rank}: {outcome[check]}"


# ------------------------------------------------------------------------------------------------------ the program


class Program:
    """Checks, on one of the ranks."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, rank, checks):
        outcome = dict.fromkeys(checks, "not reached")
        for check in checks:
            try:
                getattr(self, check)()
                outcome[check] = "passed"
            except Exception:  # noqa: BLE001 - whatever it is, the test shows it
                outcome[check] = traceback.format_exc()
                break
        (self.folder / f"rank-{rank}.json").write_text(json.dumps(outcome))


class Transformers(Program):
    """Those of transformers' Trainer, and of peft."""

    def trainer(self, output, tether, *, sharded, model=None, **fsdp):
        """A Trainer of a tiny BERT, of which every rank sees other batches."""
        import transformers
        from accelerate import DistributedType, FullyShardedDataParallelPlugin

        class Sentences(torch.utils.data.Dataset):
            def __len__(self):
                return 32

            def __getitem__(self, number):
                ids = torch.randint(5, 40, (8,), generator=torch.Generator().manual_seed(number))
                return {"input_ids": ids, "labels": int(ids[0] % 2)}

        class OnCPU(transformers.Trainer):
            """Shards on a CPU as on a GPU: accelerate 1.15 quietly falls back to DDP there (state.py, MULTI_CPU)."""

            def create_accelerator_and_postprocess(self):
                super().create_accelerator_and_postprocess()
                if sharded:
                    self.accelerator.state.distributed_type = DistributedType.FSDP
                    plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
                    self.accelerator.state.fsdp_plugin = plugin
                    self.is_fsdp_enabled = True

        arguments = transformers.TrainingArguments(
            str(self.folder / output),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            logging_steps=2,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo",
            fsdp=True if sharded else None,
            fsdp_config={
                "state_dict_type": "SHARDED_STATE_DICT",
                "transformer_layer_cls_to_wrap": ["BertLayer"],
                **fsdp,
            }
            if sharded
            else None,
        )
        return OnCPU(model or self.network(), arguments, train_dataset=Sentences(), callbacks=[tether, self.witness()])

    def network(self):
        import transformers

        torch.manual_seed(0)
        sizes = {"hidden_size": 14, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 17}
        config = transformers.BertConfig(
            **sizes, vocab_size=40, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        return transformers.BertForSequenceClassification(config)

    def witness(self):
        import transformers

        program = self

        class Witness(transformers.TrainerCallback):
            def on_step_end(self, _args, _state, _control, model=None, **_):
                program.shares.append(max(program.promise(model)))

        self.shares = []
        return Witness()

    def promise(self, model):
        """The distances as shares of their radii, in float64, from the gathered weights."""
        from tethertune import norms, rows
        from tethertune.sharding import full

        start, shares = self.network().state_dict(), []
        for layer in rows.layers(model, head="classifier"):
            if layer.rows.kind == "map":
                weight = full(layer.weight.detach()).double()
                centre = 0 * weight if layer.role == "head" else start[layer.name].double()
                shares.append(float(norms.mars(weight - centre)) / (0.5 if layer.role == "head" else 0.1))
        return shares

    def train_and_resume(self, *, sharded):
        from tethertune.integrations.transformers import ConstraintCallback
        from tethertune.sharding import full, is_sharded

        output = "fsdp" if sharded else "ddp"
        options = {"radius": 0.1, "head": "classifier", "head_radius": 0.5}
        tether = ConstraintCallback(**options)
        trainer = self.trainer(output, tether, sharded=sharded)
        trainer.train()
        weights = {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()}
        assert all(is_sharded(p) == sharded for p in trainer.model.parameters())
        assert len(self.shares) == 4
        assert 0.99 < max(self.shares) <= 1, self.shares
        assert 0.99 < trainer.state.log_history[0]["tether/largest_share"] <= 1
        for name, weight in weights.items():
            others = [torch.empty_like(weight) for _ in range(2)]
            torch.distributed.all_gather(others, weight)
            assert torch.equal(*others), f"{name} differs between the ranks"

        again = ConstraintCallback(**options)
        resumed = self.trainer(f"{output}-again", again, sharded=sharded)
        resumed.train(resume_from_checkpoint=str(self.folder / output / "checkpoint-2"))
        for name, parameter in resumed.model.named_parameters():
            assert torch.equal(full(parameter.detach()), weights[name]), name
        assert again.constraint.distances() == tether.constraint.distances()
        return weights

    def ddp(self):
        self.weights = self.train_and_resume(sharded=False)

    def fsdp(self):
        for name, weight in self.train_and_resume(sharded=True).items():
            torch.testing.assert_close(weight, self.weights[name], rtol=1e-4, atol=1e-5)

    def sharded_adapters(self):
        """The update of sharded factors is what one process makes of them whole."""
        import peft
        from torch import nn
        from torch.distributed.fsdp import fully_shard

        import tethertune as tt
        from tethertune.errors import ConfigurationError
        from tethertune.sharding import full

        def model():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 7), nn.Linear(7, 1))
            config = peft.LoraConfig(r=3, target_modules=["0", "1", "2"], init_lora_weights=False)
            return peft.get_peft_model(net, config)

        for norm in ("mars", "frobenius"):
            alone, apart = model(), model()
            tt.Constraint(alone, norm=norm, radius=0.1).project()
            for layer in apart.base_model.model:
                fully_shard(layer)
            constraint = tt.Constraint(apart, norm=norm, radius=0.1)
            constraint.project()
            for distance in constraint.distances().values():
                assert 0.0999 < distance.value <= 0.1
            for (name, whole), shard in zip(alone.named_parameters(), apart.parameters(), strict=True):
                torch.testing.assert_close(full(shard), whole, rtol=1e-6, atol=1e-9, msg=name)
        try:
            tt.Constraint(apart, norm="mars", radius=0.1, include=["*.0.weight"]).project()
        except ConfigurationError as error:
            assert "spreads its rows over ranks" in str(error)  # noqa: PT017 - there is no pytest here
        else:
            raise AssertionError("The columns of an embedding's factor are sharded, and it was not refused.")

    def loaded_on_the_first_rank_alone(self):
        """As ``from_pretrained`` leaves the others under ``cpu_ram_efficient_loading``: with whatever was in memory."""
        from safetensors.torch import save_file

        from tethertune.errors import ReferenceMismatchError
        from tethertune.integrations.transformers import ConstraintCallback

        options = {"radius": 0.1, "head": "classifier", "head_radius": 0.5}

        def trained(output, resume=None, **more):
            model = self.network()
            if torch.distributed.get_rank():
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.fill_(7.0)
            tether = ConstraintCallback(**options, **more)
            trainer = self.trainer(output, tether, sharded=True, model=model, cpu_ram_efficient_loading=True)
            trainer.train(resume_from_checkpoint=resume)
            assert 0.99 < max(self.shares) <= 1, self.shares
            return tether.constraint.distances()

        distances = trained("first")
        checkpoint = str(self.folder / "first/checkpoint-2")
        try:
            trained("refused", checkpoint)
        except ReferenceMismatchError as error:
            assert "reference=" in str(error)  # noqa: PT017 - there is no pytest here
        else:
            raise AssertionError("A checkpoint was resumed without a reference.")
        file = self.folder / f"pretrained-{torch.distributed.get_rank()}.safetensors"
        save_file(self.network().state_dict(), file)
        assert trained("resumed", checkpoint, reference=file) == distances


class Lightning(Program):
    """Those of Lightning's Trainer."""

    def ddp(self):
        from lightning.pytorch.strategies import DDPStrategy

        self.train_and_resume("ddp", DDPStrategy, sharded=False)

    def model_parallel(self):
        from lightning.pytorch.strategies import ModelParallelStrategy

        self.train_and_resume("model_parallel", ModelParallelStrategy, sharded=True)

    def module_class(self, *, sharded):
        import lightning
        from torch import nn

        from tethertune import norms
        from tethertune.sharding import full, is_sharded

        def network():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))

        start = network().state_dict()

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.network, self.shares = network(), []

            def configure_model(self):
                if sharded and not is_sharded(self.network[0].weight):
                    from torch.distributed.fsdp import fully_shard

                    for part in (self.network[0], self.network[2], self.network):
                        fully_shard(part, mesh=self.device_mesh["data_parallel"])

            def training_step(self, batch, _):
                for layer in ("0.weight", "2.weight"):
                    weight = full(self.network.get_parameter(layer).detach()).double()
                    self.shares.append(float(norms.mars(weight - start[layer].double())) / 0.1)
                return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=0.05)

        return Module

    def train_and_resume(self, name, strategy, *, sharded):
        import lightning

        from tethertune.integrations.lightning import ConstraintCallback
        from tethertune.sharding import full, is_sharded

        Module = self.module_class(sharded=sharded)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 6, generator=generator)
        data = torch.utils.data.TensorDataset(x, torch.randint(0, 3, (64,), generator=generator))

        def fitted(part, checkpoint=None):
            module, tether = Module(), ConstraintCallback(radius=0.1)
            trainer = lightning.Trainer(
                default_root_dir=self.folder / name / part,
                accelerator="cpu",
                devices=2,
                strategy=strategy(process_group_backend="gloo"),
                max_epochs=2,
                callbacks=[tether, lightning.pytorch.callbacks.ModelCheckpoint(save_top_k=-1)],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
            )
            trainer.fit(module, torch.utils.data.DataLoader(data, 8), ckpt_path=checkpoint)
            assert is_sharded(module.network[0].weight) == sharded
            assert 0.99 < max(module.shares) <= 1, module.shares
            assert trainer.logged_metrics["tether/largest_share"] > 0.99
            weights = {name: full(p.detach()).clone() for name, p in module.named_parameters()}
            for name_, weight in weights.items():
                others = [torch.empty_like(weight) for _ in range(2)]
                torch.distributed.all_gather(others, weight)
                assert torch.equal(*others), f"{name_} differs between the ranks"
            return weights, tether.constraint.distances()

        weights, distances = fitted("whole")
        checkpoint = next((self.folder / name / "whole").rglob("epoch=0-*.ckpt"))
        resumed, as_far = fitted("resumed", checkpoint)
        assert all(torch.equal(weights[key], resumed[key]) for key in weights)
        assert distances == as_far


def main(package, folder):
    import socket
    from importlib import import_module

    for name in {"transformers": ["transformers", "peft"], "lightning": ["lightning"]}[package]:
        import_module(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = {"transformers": Transformers, "lightning": Lightning}[package](folder)
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"RANK": str(rank)} if package == "transformers" else {"NODE_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            program.run(rank, CHECKS[package])
            os._exit(0)
        ranks.append(child)
    for child in ranks:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
