# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: a template filled from the run's record, and from nothing else.

What a record does not hold is said to be not known.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer
from transformers.utils import logging

from ..config import IPGConfig
from ..record import MAIN_SETTINGS, PAIR_SETTINGS, trainer_record

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md")
TAGS = ("ipg", "robustness", "spurious-correlation")
MARKER = "Written by ipg_hf, which writes it anew after a training. Without this line it leaves the card as it is."
NOT_KNOWN = "not known"
# metric -> its name for people, in the order of the table
MEASURES = {
    "accuracy": "accuracy",
    "worst_group_accuracy": "worst-group accuracy",
    "adjusted_accuracy": "adjusted accuracy",
    "flip_rate": "flip rate",
    "mae": "mean absolute error",
    "worst_group_mae": "worst-group mean absolute error",
    "difference": "mean absolute difference within held-out pairs",
}
IN_INDEX = ("accuracy", "worst_group_accuracy", "mae", "worst_group_mae")
PRIVATE = (
    "output_dir",
    "overwrite_output_dir",
    "preload_dir",
    "resume_from_checkpoint",
    "logging_dir",
    "push_to_hub",
)
MADE = {  # maker -> what its pairs are
    "recolor": "each training image and the same in other colours",
    "overlay": "each training image without and with something laid over it",
    "background": "a foreground of a training image, by its mask, on two backgrounds",
    "match": "two training images of one label and different attribute",
    "adversarial": "each training image and the augmentation of it that changes the output most, found at every step "
    "by gradient ascent; the attribute is not named to the training",
    "folders": "files of equal names in two folders",
    "table": "two columns of a table of images",
}


def model_card(
    record: Mapping[str, Any],
    *,
    name: str,
    twin: Mapping[str, Any] | None = None,
    others: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    **metadata: Any,
) -> ModelCard:
    """The card of a run.

    Args:
        record: the contents of its `run.json`; its entry `about` is what is known of the data.
        name: of the model: a Hub id, or the name of a folder.
        twin: record of the same training without pairs (ERM), whose results stand beside.
        others: records of the same training with other seeds, for mean and spread.
        license: of the model, an identifier of the Hub; without it the card says that none is given.
        **metadata: further entries of the card's metadata, or others in place of those that the record gives; `tags`
            are added.

    Returns:
        The card; `str(card)` is its text, `card.data` its metadata.
    """
    splits = [*record.get("metrics", {})]
    split = "test" if "test" in splits else splits[-1] if splits else ""
    metrics, config = record["metrics"][split] if split else {}, record.get("config", {})
    about = record.get("about") or {}
    base = record.get("base_model")
    tags = (*(TAGS if record.get("method") == "ipg" else ()), *metadata.pop("tags", ()))
    known = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "license": license,
        "base_model": base,
        "datasets": about.get("hub_set"),
        "metrics": [metric for metric in IN_INDEX if metric in metrics] or None,
        "tags": [*dict.fromkeys(tags)] or None,
    }
    index = [
        EvalResult(
            task_type="image-classification",
            dataset_type=about.get("hub_set") or str(config.get("dataset") or "unknown"),
            dataset_name=about.get("title") or NOT_KNOWN,
            dataset_split=split,
            dataset_revision=record.get("commit"),
            metric_type=metric,
            metric_name=MEASURES[metric],
            metric_value=float(metrics[metric]),
        )
        for metric in IN_INDEX
        if metric in metrics
    ]
    data = ModelCardData(model_name=name.split("/")[-1], eval_results=index or None, **(known | metadata))
    beside = twin["metrics"].get(split, {}) if twin else None
    texts = {
        "marker": MARKER,
        "name": name.split("/")[-1],
        "repo": name,
        "method": record.get("method"),
        "repeated": record.get("repeat_errors"),
        "changed": record.get("last_layer") or {},
        "base": f"[{base}](https://huggingface.co/{base})" if base else _from(config),
        "labels": _labels(metrics),
        "attribute": _attribute(config, about),
        "evaluated": _evaluated(record, split, about),
        "results": _results(metrics, beside) if metrics else "",
        "groups": _groups(metrics, beside),
        "errors": "mae" in metrics,
        "spread": _spread([record, *others], split),
        "data": _data(about),
        "pairs": _pairs(record, about),
        "findings": _findings(record),
        "procedure": _procedure(record),
        "settings": _settings(config, record.get("method")),
        "limits": _limits(record, about, license),
        "reproduce": _reproduce(record),
    }
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **texts)
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)  # of what had nothing to say
    return card


# ---- The texts ----


def _from(config: Mapping[str, Any]) -> str:
    if config.get("model_type"):
        return f"A `{config['model_type']}` from random weights"
    return "An image classifier (what it was fine-tuned from is not known)"


def _group_names(metrics: Mapping[str, Any]) -> list[list[str]]:
    prefix = "group_mae/" if "mae" in metrics else "group_accuracy/"
    return [key.removeprefix(prefix).split("/", 1) for key in metrics if key.startswith(prefix)]


def _labels(metrics: Mapping[str, Any]) -> str:
    names = [*dict.fromkeys(label for label, _ in _group_names(metrics))]
    if "mae" in metrics:
        return "predict a number"
    if not names:
        return f"tell its classes (names {NOT_KNOWN})"
    return (
        "tell "
        + ", ".join(f"`{name}`" for name in names[:20])
        + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    )


def _attribute(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    column = (config.get("dataset_options") or {}).get("attribute")
    named = f"the attribute `{column}`" if column else "what the two sides of its pairs differ in"
    return about.get("attribute") or named


def _evaluated(record: Mapping[str, Any], split: str, about: Mapping[str, Any]) -> str:
    config, commit = record.get("config", {}), record.get("commit")
    title = f"{about['title']} (`{config.get('dataset')}`)" if about else f"data that are {NOT_KNOWN} to this card"
    drawn = f", as ipg_hf draws it at commit `{commit}` with seed {record.get('seed')}" if about and commit else ""
    if not split:
        return "It has not been evaluated."
    chosen = ""
    if config.get("load_best_model_at_end"):
        metric = config.get("metric_for_best_model") or "loss"
        chosen = f" The checkpoint (step {record.get('chosen_step')}) was chosen by `{metric}` on the validation split"
        chosen += ", the test split was read once." if split == "test" else "."
    return f"Measured on the {split} split of {title}{drawn}.{chosen}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(metrics: Mapping[str, Any] | None, key: str) -> str:
    return f"{metrics[key]:.3f}" if metrics and key in metrics else NOT_KNOWN


def _results(metrics: Mapping[str, Any], twin: Mapping[str, Any] | None) -> str:
    rows = [
        [title, _number(metrics, key), *([_number(twin, key)] if twin is not None else [])]
        for key, title in MEASURES.items()
        if key in metrics
    ]
    return _table(["", "this model", *(["same training without pairs (ERM)"] if twin is not None else [])], rows)


def _groups(metrics: Mapping[str, Any], twin: Mapping[str, Any] | None) -> str:
    prefix = "group_mae/" if "mae" in metrics else "group_accuracy/"
    rows = []
    for label, attribute in _group_names(metrics):
        group = f"{label}/{attribute}"
        cells = [label, attribute, f"{metrics[f'group_n/{group}']:.0f}", _number(metrics, prefix + group)]
        rows.append([*cells, *([_number(twin, prefix + group)] if twin is not None else [])])
    measure = "error" if "mae" in metrics else "accuracy"
    header = ["label", "attribute", "images", measure, *([f"{measure}, ERM"] if twin is not None else [])]
    return _table(header, rows) if rows else ""


def _spread(records: Sequence[Mapping[str, Any]], split: str) -> str:
    if len(records) < 2:
        return ""
    texts = []
    for key in IN_INDEX:
        values = [record["metrics"][split][key] for record in records if key in record["metrics"][split]]
        if len(values) > 1:
            texts.append(f"{MEASURES[key]} {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    seeds = ", ".join(str(record["seed"]) for record in records)
    return (
        f"Over {len(records)} seeds ({seeds}; this model is the first): {', '.join(texts)} (mean ± standard deviation)."
    )


def _data(about: Mapping[str, Any]) -> str:
    if not about:
        return f"The training data are {NOT_KNOWN} to this card."
    source = about["source"]
    return f"Training data: {about['title']}. {source[0].upper()}{source[1:]}. {about['shortcut']}"


def _pairs(record: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    if record.get("method") != "ipg":
        known = "No pairs were used in the training." if record.get("last_layer") else "No pairs were used."
        return known if record.get("method") else f"Whether pairs were used is {NOT_KNOWN}."
    config, sets = record.get("config", {}), (record.get("data") or {}).get("pair_sets", {})
    made = config.get("pairs") or {}
    named = {"": made} if "maker" in made else made
    if made:
        source = "; ".join(f"{name}: {MADE[o['maker']]}" if name else MADE[o["maker"]] for name, o in named.items())
    else:
        source = about.get("pairs") or f"their source is {NOT_KNOWN} to this card"
    if sets:
        numbers = ", ".join(
            f"{entry['pairs'] or NOT_KNOWN}{f' ({name})' if name else ''}" for name, entry in sets.items()
        )
    else:
        default = [options.get("num_pairs") for options in named.values()] if made else [about.get("num_pairs")]
        numbers = ", ".join(str(number or config.get("num_pairs") or NOT_KNOWN) for number in default)
    texts = [_teaching(config), f"Pairs: {source}. Their number: {numbers}."]
    if config.get("pair_sets"):
        texts.append(f"Of the pair sets only {', '.join(config['pair_sets'])} was used.")
    if config.get("oriented_pairs") is False:
        texts.append("The sides of a random half of them were swapped on purpose.")
    if config.get("degrade_pairs"):
        texts.append(f"The pairs were spoiled on purpose: {config['degrade_pairs']}.")
    if config.get("mix_pairs"):
        texts.append("That is with mixtures of two pairs, by which a smaller number was enlarged (`mix_pairs`).")
    return " ".join(texts)


def _teaching(config: Mapping[str, Any]) -> str:
    penalty = config.get("pair_objective", "ipg")
    if penalty != "ipg":
        return f"A penalty on pairs was added to the loss (`pair_objective: {penalty}`)."
    is_ours = config.get("invariance_distance", IPGConfig.invariance_distance) == "divergence"
    agree = "outputs on" if is_ours else "rationales of"
    paper = f"[arXiv 2502.18975](https://arxiv.org/abs/2502.18975){', with a distance of ipg_hf' if is_ours else ''}"
    return (
        f"Invariance pair-guided learning ({paper}): each optimizer step first moves the weights so that the {agree} "
        "the two images of each pair agree, then along the task gradient."
    )


def _findings(record: Mapping[str, Any]) -> str:
    if record.get("method") != "ipg":
        return ""
    sets = (record.get("data") or {}).get("pair_sets", {})
    checked = {name: entry["findings"] for name, entry in sets.items() if entry["findings"] is not None}
    if not checked:
        return f"What `ipg pairs check` finds in them: {NOT_KNOWN}."
    told = [
        f"- {severity} `{code}`{f' ({name})' if name else ''}: {message}"
        for name, findings in checked.items()
        for severity, code, message in findings
        if severity != "info"
    ]
    if not told:
        return "The fast form of `ipg pairs check` found no errors and no warnings in them."
    return "\n".join(["The fast form of `ipg pairs check` found in them:", "", *told])


def _procedure(record: Mapping[str, Any]) -> str:
    hardware, versions, seconds = record.get("hardware"), record.get("versions") or {}, record.get("seconds")
    machine = NOT_KNOWN
    if hardware:
        machine = ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cpus')} processor cores, no GPU"
    told = {
        "Optimizer steps": record.get("steps", NOT_KNOWN),
        "seconds": NOT_KNOWN if seconds is None else f"{seconds:.0f}",
        "hardware": machine,
        "software": ", ".join(f"{name} {number}" for name, number in versions.items() if number) or NOT_KNOWN,
    }
    return "; ".join(f"{name}: {value}" for name, value in told.items()) + "."


def _settings(config: Mapping[str, Any], method: str | None) -> str:
    if not config:
        return f"The settings are {NOT_KNOWN}."
    defaults = {field.name: field.default for field in fields(IPGConfig)}
    names = (*PAIR_SETTINGS, *MAIN_SETTINGS) if method == "ipg" else MAIN_SETTINGS
    if config.get("lr_scheduler_type") in ("constant", "reduce_lr_on_plateau", "greedy"):  # none has a warm-up
        names = [name for name in names if name != "warmup_steps"]
    rows = [[f"`{name}`", f"{config.get(name, defaults[name])}"] for name in names]
    return _table(["setting", "value"], rows)


def _limits(record: Mapping[str, Any], about: Mapping[str, Any], license: str | None) -> list[str]:
    images = about.get("license") or NOT_KNOWN
    given = license or "not given by whoever trained it"
    limits = [f"Licence of this model: {given}; of the images it was trained on: {images}."]
    if record.get("method") == "ipg":
        limits.insert(0, "It was taught to ignore what its pairs show, as well as they show it, and no other shortcut.")
    if record.get("metrics") and "test" not in record["metrics"]:
        limits.append("Measured on the evaluation set alone, which may have chosen the checkpoint too.")
    return limits


def _reproduce(record: Mapping[str, Any]) -> str:
    config, commit = record.get("config", {}), record.get("commit")
    if "dataset" not in config:
        return (
            f"The script that trained it is {NOT_KNOWN}; its settings are above (seed {record.get('seed', NOT_KNOWN)})."
        )
    recipe = {name: value for name, value in config.items() if name not in PRIVATE and not name.startswith("hub_")}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
    version = (record.get("versions") or {}).get("ipg_hf")
    at = f" at commit `{commit}`" if commit else f" {version}" if version else f" (version {NOT_KNOWN})"
    command = "```bash\nipg train --config recipe.yaml --output_dir out\n```"
    return f"With ipg_hf{at}, this recipe as `recipe.yaml`:\n\n```yaml\n{text}\n```\n\n{command}"


def write_card(
    trainer: Trainer,
    record: Mapping[str, Any] | None = None,
    *,
    model_name: str | None = None,
    language: Any = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    dataset_tags: Any = None,
) -> None:
    """Writes the card of a trainer's model into its output folder, `README.md`; see `Trainer.create_model_card`.

    A README.md without the line by which ipg_hf knows its own is left as it is, with a warning.

    Args:
        trainer: the trainer.
        record: of its run, where there is one; else what the trainer knows.
        model_name: by default the Hub id, or the name of the output folder.
        language: of the card's metadata.
        license: of the model, as the Hub spells it.
        tags: further ones.
        finetuned_from: Hub id of the base model, where the record does not know it.
        dataset_tags: Hub ids of the data, likewise.
    """
    record = dict(record or trainer_record(trainer))
    folder = Path(trainer.args.output_dir)
    name = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id or model_name or folder.resolve().name
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    if record["method"] != "ipg":
        tags = [tag for tag in tags if tag not in TAGS]  # the trainer puts its own on every model
    record["base_model"] = finetuned_from or record.get("base_model")
    metadata = {"language": language, "datasets": dataset_tags or (record.get("about") or {}).get("hub_set")}
    if hasattr(trainer.model, "peft_config"):
        metadata["library_name"] = "peft"
    path = folder / "erm" / "run.json"
    twin = json.loads(path.read_text(encoding="utf-8")) if record.get("about") and path.is_file() else None
    card = model_card(record, name=name, twin=twin, license=license, tags=tags, **metadata)
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    if readme.is_file() and MARKER not in readme.read_text(encoding="utf-8"):
        logger.warning(f"{readme} is not a card that ipg_hf has written: it stays. Remove it to get one.")
        return
    readme.write_text(f"{card}\n", encoding="utf-8")
