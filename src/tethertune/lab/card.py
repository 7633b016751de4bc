"""The model card of a run: the ``README.md`` beside its weights."""

import json
from collections.abc import Mapping
from statistics import median
from typing import Any

from tethertune.lab.config import FinetuneConfig
from tethertune.lab.methods import METHODS

__all__ = ["write"]


def write(
    config: FinetuneConfig,
    info: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Any]],
    *,
    library: str = "timm",
    file: str = "",
) -> str:
    """A model card as the Hugging Face hub reads it: YAML front matter, then Markdown.

    Args:
        config: The run's configuration.
        info: The run's ``run.json``, with its outcome.
        layers: The ``layers`` of its ``distances.json``.
        library: What loads the weights.
        file: A section on the file itself, where there is more to say than that it holds the weights.
    """
    sections = [_front_matter(info, library), _title(info), *([file] if file else []), _method(config)]
    sections += [_distances(layers), _data(info), _outcome(info), _repeat(info), _limits(config, info)]
    return "\n".join(sections)


def _front_matter(info: Mapping[str, Any], library: str) -> str:
    model, data = info["model"], info["data"]
    fields = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "tethertune", info["config"]["method"]],
        "base_model": model["name"],
        "datasets": [data["name"]],
        "metrics": ["accuracy"],
    }
    if model.get("license"):
        fields["license"] = model["license"]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in fields.items()]  # JSON is YAML
    return f"---\n{''.join(lines)}---\n"


def _title(info: Mapping[str, Any]) -> str:
    model, data = info["model"], info["data"]
    return (
        f"# {model['name']} fine-tuned on {data['name']} with {info['config']['method']}\n\n"
        f"- Base weights: {model['source']}, SHA-256 `{model['weights_sha256'] or 'unknown'}`,"
        f" licence {model.get('license') or 'not known: see their source'}\n"
        f"- Head: `{model['head']}`, {len(data['classes'])} classes; {model['parameters']:,} parameters in all\n"
        f"- Input: {model['size']} x {model['size']} pixels, {model['interpolation']} resize,"
        f" mean {model['mean']}, standard deviation {model['std']}\n"
    )


def _method(config: FinetuneConfig) -> str:
    method = METHODS[config.method]
    values = [f"{key} {getattr(config, key)}" for key in method.accepts if getattr(config, key) is not None]
    return f"## Method\n\n{method.name}: {method.description}" + (f" {', '.join(values)}.\n" if values else "\n")


def _distances(layers: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| layers | norm | median | largest |\n|---|---|---|---|\n"]
    for role, origin in (("body", "pre-trained weights"), ("head", "zero")):
        for norm in ("mars", "frobenius"):
            values = [layer[norm] for layer in layers.values() if layer["role"] == role]
            if values:
                rows.append(f"| {role}, from {origin} | {norm} | {median(values):.4g} | {max(values):.4g} |\n")
    held = sum(layer["radius"] is not None for layer in layers.values())
    promise = f"{held} of {len(layers)} layers were held within a radius; all are in `distances.json`.\n"
    return f"## Measured distances\n\n{''.join(rows)}\n{promise}"


def _data(info: Mapping[str, Any]) -> str:
    data = info["data"]
    sizes = ", ".join(f"{size} {name}" for name, size in data["sizes"].items())
    return f"## Data\n\n{data['name']}: {sizes} images, fingerprint `{data['fingerprint']}`.\n"


def _outcome(info: Mapping[str, Any]) -> str:
    outcome = info["outcome"]
    names = ("test_accuracy", "validation_accuracy", "train_accuracy")
    shown = [f"- {name.replace('_', ' ')}: {outcome[name]:.2%}\n" for name in names if outcome[name] is not None]
    shown += [_kept(outcome)] if outcome.get("retention") else []
    return (
        f"## Results\n\n{''.join(shown)}- one run, seed {info['config']['seed']}, {outcome['epochs']} epochs,"
        f" {outcome['steps']} steps\n"
    )


def _kept(outcome: Mapping[str, Any]) -> str:
    kept, alpha = outcome["retention"], outcome["alpha"]
    back = f", after going back to {alpha} of the way from the base weights" if alpha < 1 else ""
    return f"- answers kept: {kept['share']:.2%} of the base network's {kept['confident']} confident ones{back}\n"


def _repeat(info: Mapping[str, Any]) -> str:
    made_with = ", ".join(f"{name} {value}" for name, value in info["versions"].items())
    return f"## Repeat it\n\n```\n{info['command']}\n```\n\nMade with {made_with}.\n"


def _limits(config: FinetuneConfig, info: Mapping[str, Any]) -> str:
    classes = len(info["data"]["classes"])
    sentences = [
        "One seed is one draw: compare methods by several.",
        f"Only {classes} classes were trained and tested; any other input gets one of them all the same.",
    ]
    if METHODS[config.method].kind == "constraint" and config.affine == "free":
        sentences.append(
            "The radii bound the linear maps; biases and normalisation layers were trained without a bound."
        )
    if config.bn == "train":
        sentences.append("Batch-norm statistics moved with the data, and no radius bounds them.")
    return "## Limits\n\n" + " ".join(sentences) + "\n"
