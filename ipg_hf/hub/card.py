# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: the template `model_card.md`, filled from the run's record and from nothing else."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..metrics import METRICS, OF_PAIRS, group_parts
from ..record import NO_SETTINGS, NOT_RECORDED

TEMPLATE = Path(__file__).with_name("model_card.md")
MARKER = "<!-- Written by ipg_hf"  # only a README.md with this line is written over
IN_INDEX = ("accuracy", "worst_group_accuracy", "mae", "worst_group_mae")
TAGS = ("robustness", "spurious-correlation")
GUIDED = ("ipg", "ablation")
NEEDS_PAIRS = (*GUIDED, "kl", "features", "rationales", "augmentation", "project")

IPG_PAPER = "[arXiv 2502.18975](https://arxiv.org/abs/2502.18975)"
# method -> what it does; a name in braces is a setting, or a fact that the method reports
METHOD_TEXTS = {
    "ipg": f"Invariance pair-guided learning (IPG, {IPG_PAPER}). Each optimizer step has two updates. The corrective "
    "update makes {agree} agree{and_loss}. The update of the task follows; its gradient is scaled while the outputs of "
    "the pairs disagree.",
    "ablation": f"An ablation of invariance pair-guided learning (IPG, {IPG_PAPER}): a part of its step is changed, as "
    "the settings say. The corrective update makes {agree} agree{and_loss}.",
    "erm": "Plain training (ERM), without pairs. Nothing keeps the model from using {attribute}.",
    "kl": "A penalty on pairs, added to the task loss: the symmetric KL divergence between the outputs on the two "
    "images of a pair, times {pair_penalty_weight}.",
    "features": "A penalty on pairs, added to the task loss (feature matching): the squared distance between the "
    "features of the two images of a pair, times {pair_penalty_weight}.",
    "rationales": "A penalty on pairs, added to the task loss: the squared distance between the rationales of the two "
    "images of a pair, times {pair_penalty_weight}. The idea is that of RIDG (Chen et al., ICCV 2023), which compares "
    "with the mean of a class.",
    "augmentation": "Counterfactual data augmentation: the task loss of both images of each pair is added to the task "
    "loss, times {pair_penalty_weight}.",
    "irm": "Invariant risk minimization ([arXiv 1907.02893](https://arxiv.org/abs/1907.02893)), without pairs. The "
    "weight of its penalty is {environment_penalty_weight}.",
    "vrex": "V-REx ([arXiv 2003.00688](https://arxiv.org/abs/2003.00688)), without pairs. The weight of its penalty is "
    "{environment_penalty_weight}.",
    "dfr": "Deep feature reweighting ([arXiv 2204.02937](https://arxiv.org/abs/2204.02937)), without pairs. After "
    "plain training the last layer was fitted again to {rows} validation images, with all groups in equal numbers "
    "(C = {strength}). Results on the validation split are of the other images.",
    "project": "Projection, after Noisy Counterfactual Matching "
    "([arXiv 2505.24843](https://arxiv.org/abs/2505.24843)). After plain training, the directions in which the "
    "features of pairs differ most were taken out of the last layer (number of directions: {rank}).",
    "jtt": "Just Train Twice ([arXiv 2107.09044](https://arxiv.org/abs/2107.09044)), without pairs. A first model was "
    "trained for {first_steps} steps. The {errors} training images that it got wrong stand {upweight} times each in "
    "the training set of this model.",
}
# value of `invariance_distance` -> what the corrective update makes agree
AGREE = {
    "rationale": "the rationales of the two images of each pair",
    "rationale_divergence": "the outputs on the two images of each pair, and feature by feature their rationales,",
    "divergence": "the outputs on the two images of each pair",
}
# what the paper's method has; a card says where a run differs
PAPER = {
    "invariance_distance": "rationale",
    "rationale_reduction": "mean",
    "max_loss_scale": math.inf,
    "correction_interval": 1,
    "correction_schedule": "always",
    "corrective_layers": None,
    "pair_loss_weight": 0.0,
}
# method -> its own settings, shown before those of every training
OWN_SETTINGS = {
    "ipg": ("alpha", "invariance_threshold", *PAPER, "per_device_pair_batch_size"),
    **dict.fromkeys(
        ("kl", "features", "rationales", "augmentation"), ("pair_penalty_weight", "per_device_pair_batch_size")
    ),
    **dict.fromkeys(("irm", "vrex"), ("environment_penalty_weight", "environment_penalty_start")),
    "dfr": ("num_fits", "strengths"),
    "project": ("rank",),
    "jtt": ("first_steps", "upweight"),
}
OWN_SETTINGS["ablation"] = (
    *OWN_SETTINGS["ipg"],
    *("loss_scaling", "shared_optimizer_state", "rationale_norm", "pair_combination"),
)
SETTINGS = (
    *("objective", "learning_rate", "optim", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("freeze_norm", "running_norm", "random_flip", "random_crop_scale", "seed"),
)
NOTES = {  # metric -> what it is, below the results
    "adjusted_accuracy": "Adjusted accuracy: the mean over these groups, weighted by their sizes in training.",
    "flip_rate": "Flip rate: the share of held-out pairs whose two images get different predictions; with several pair "
    "sets, of the worst set.",
    "pair_accuracy": "Pair accuracy: the share of held-out pairs with both images predicted right; with several pair "
    "sets, of the worst set.",
}
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
MADE = {  # maker -> what its pairs are
    "recolor": "a training image, and the same image in other colours",
    "overlay": "a training image, without and with something laid over it",
    "background": "the foreground of a training image, by its mask, on two backgrounds",
    "exchange": "a training image, and the same image with a part of another one",
    "match": "two training images with one label and different attributes",
    "adversarial": "a training image, and the augmentation of it that changes the output most, which each step finds "
    "by gradient ascent; the training does not know the attribute",
    "folders": "files with equal names in two folders",
    "table": "two columns of a table of images",
}


def model_card(
    record: Mapping[str, Any],
    *,
    name: str,
    erm: Mapping[str, Any] | None = None,
    others: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    **metadata: Any,
) -> ModelCard:
    """Makes the card of a run from its record.

    Args:
        record: the contents of a `run.json`.
        name: Hub id of the model, or a word such as the name of a folder.
        erm: record of a plain training with the same seed. Its results are in a second column, and the card names every
            other setting in which it differs.
        others: records of the same training with other seeds, for mean and standard deviation.
        license: licence of the model, as the Hub spells it. Without it the card says that none was given.
        **metadata: entries of the card's metadata. `tags` are added to the card's own; every other entry replaces the
            card's own.

    Returns:
        The card; `str(card)` is its text, `card.data` its metadata.
    """
    method, about, settings = record["method"], record.get("about") or {}, record["settings"]
    splits = [split for split, found in record["metrics"].items() if found]
    if {*splits} <= {"validation", "test"}:
        splits = ["test"] if "test" in splits else splits  # the validation split may have chosen the checkpoint
    scored = [metric for metric in IN_INDEX if any(metric in record["metrics"][split] for split in splits)]
    tags = ["ipg"] if method in GUIDED else []
    tags += [*(TAGS if method != "erm" else ()), *metadata.pop("tags", ())]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=about.get("hub_set") or str(settings.get("dataset", NOT_RECORDED)),
            dataset_name=about.get("title") or NOT_RECORDED,
            dataset_split=split,
            metric_type=metric,
            metric_name=METRICS[metric].title,
            metric_value=float(record["metrics"][split][metric]),
        )
        for split in splits
        for metric in scored
        if metric in record["metrics"][split]
    ]
    known = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "license": license,
        "base_model": record.get("base_model"),
        "datasets": about.get("hub_set"),
        "metrics": scored or None,
        "tags": [*dict.fromkeys(tags)] or None,
    }
    if results:
        known |= {"model_name": name.split("/")[-1], "eval_results": results}
    data = ModelCardData(**(known | metadata))
    shown, shown_results = shown_settings(record), [_results(split, record, erm) for split in splits]
    facts = {**settings, **record.get("baseline", {}), "attribute": about.get("attribute") or "a spurious attribute"}
    facts["and_loss"] = " and lowers the task loss of both" if _uses_pair_labels(record) else ""
    facts["agree"] = AGREE.get(settings.get("invariance_distance"), "the two images of each pair")
    context = {
        "record": record,
        "about": about,
        "settings": settings,
        "not_recorded": NOT_RECORDED,
        "title": name.split("/")[-1],
        "repo": name if "/" in name else f"<your-name>/{name}",
        "repo_note": "" if "/" in name else "# replace <your-name> by your name on the Hub\n",
        "license": license,
        "results": shown_results,
        "names": [_in_one_line(split) or "(no name)" for split in splits],
        "labels": [*dict.fromkeys(label for part in shown_results for label in part["labels"])],
        "is_number": any(part["is_number"] for part in shown_results),
        "has_erm": erm is not None,
        "is_adapter": metadata.get("library_name") == "peft",
        "erm_differences": _differences(erm, record) if erm else None,
        "data_seed": record["seed"] if settings.get("data_seed") is None else settings["data_seed"],
        "seeds": [run["seed"] for run in (record, *others)],
        "spread": _spread([record, *others], splits[0], scored) if len(splits) == 1 else "",
        "method": METHOD_TEXTS[method].format_map(defaultdict(lambda: NOT_RECORDED, facts)),
        "cites_paper": method in GUIDED,
        "uses_pairs": method in NEEDS_PAIRS,
        "departures": [[key, value, shown[key]] for key, value in PAPER.items() if shown.get(key, value) != value],
        "pairs": _pair_sets(record),
        "pair_source": _pair_source(settings, about),
        "findings": _findings(record),
        "shown": shown,
        "recipe": _recipe(record, shown),
    }
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **context)
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)  # left by parts that have nothing to say
    return card


def shown_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the table of a card, by name: those of the method, and the main ones of every training.

    Settings that have no effect beside the others are left out.
    """
    settings = {**record["settings"], "seed": record["seed"]}
    names = [*OWN_SETTINGS.get(record["method"], ()), *SETTINGS]
    shown = {name: settings.get(name, NOT_RECORDED) for name in names}
    if shown.get("invariance_distance") in ("divergence", "rationale_divergence"):
        del shown["rationale_reduction"]
    if not _uses_pair_labels(record):
        shown.pop("pair_loss_weight", None)
    if shown["lr_scheduler_type"] in WITHOUT_WARMUP:
        del shown["warmup_steps"]
    if shown["max_steps"] != NOT_RECORDED:
        del shown["num_train_epochs" if shown["max_steps"] > 0 else "max_steps"]
    return shown


def _results(split: str, record: Mapping[str, Any], erm: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a card shows of a split: rows of the table of scores and of the table of groups, with their titles."""
    metrics = record["metrics"][split]
    models = [metrics, *([erm["metrics"].get(split, {})] if erm else [])]
    kind = "mae" if "mae" in metrics else "accuracy"
    titles = {key: title for key, title in map(_titled, metrics) if title}
    own = {key: key for key, value in metrics.items() if "/" not in key and isinstance(value, (int, float))}
    own = {key: title for key, title in own.items() if key not in (*METRICS, *OF_PAIRS, "loss")}
    # metrics of the user's own have their names; where there is nothing else, the loss is what was measured
    titles = titles | own or {"loss": "loss"}
    groups = [key.removeprefix("group_n/") for key in metrics if key.startswith("group_n/")]
    return {
        "split": split,
        "metrics": metrics,
        "is_number": kind == "mae",
        "labels": [*dict.fromkeys(_code(group_parts(name)[0]) for name in groups)],
        "scores": [[_cell(title), *_numbers(key, models)] for key, title in titles.items()],
        "notes": [text for name, text in NOTES.items() if name in metrics],
        "groups": [
            [
                *map(_cell, group_parts(name)),
                f"{metrics[f'group_n/{name}']:.0f}",
                *_numbers(f"group_{kind}/{name}", models),
            ]
            for name in groups
        ],
    }


def _numbers(key: str, models: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{metrics[key]:.3f}" if key in metrics else NOT_RECORDED for metrics in models]


def _cell(text: Any) -> str:
    """A text in a cell of a Markdown table."""
    return _in_one_line(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _code(text: Any) -> str:
    """A text in code, between backticks."""
    return f"`{_in_one_line(text).replace('`', chr(39))}`"


def _in_one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _titled(key: str) -> tuple[str, str | None]:
    """A metric and its title; the metric of one pair set, "SET/flip_rate", has the set in its title."""
    pair_set, _, metric = key.rpartition("/")
    if metric not in METRICS or "/" in pair_set:
        return key, None
    return key, METRICS[metric].title + (f", {pair_set}" if pair_set else "")


def _spread(records: Sequence[Mapping[str, Any]], split: str | None, metrics: Sequence[str]) -> str:
    if len(records) < 2:
        return ""
    parts = []
    for metric in metrics:
        values = [record["metrics"][split][metric] for record in records]
        parts.append(f"{METRICS[metric].title} {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    return ", ".join(parts)


def _differences(erm: Mapping[str, Any], record: Mapping[str, Any]) -> list[list[Any]]:
    """Name and the two values of each common setting in which ERM's training differs."""
    pairs = [
        [name, *({**run["settings"], "seed": run["seed"]}.get(name) for run in (erm, record))] for name in SETTINGS
    ]
    return [[name, its, own] for name, its, own in pairs if its != own]


def _pair_sets(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Name and number of pairs of each pair set that the training read; the name of a single set is empty."""
    sets = {name: entry["pairs"] for name, entry in ((record.get("data") or {}).get("pair_sets") or {}).items()}
    if len(sets) > 1:
        return [(_in_one_line(name), NOT_RECORDED if number is None else number) for name, number in sets.items()]
    number, settings = next(iter(sets.values()), None), record["settings"]
    changed = any(settings.get(key) for key in ("pairs", "extend_pairs", "mix_pairs"))
    if number in (None, NOT_RECORDED) and not changed:
        number = settings.get("num_pairs")
    return [("", NOT_RECORDED if number is None else number)]


def _uses_pair_labels(record: Mapping[str, Any]) -> bool:
    """Whether the corrective update lowered the task loss of pairs."""
    if record["settings"].get("pair_loss_weight") in (None, 0, NOT_RECORDED):  # some versions had no such setting
        return False
    sets = (record.get("data") or {}).get("pair_sets") or {}
    return any(entry.get("labelled", True) for entry in sets.values())


def _pair_source(settings: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    makers = settings.get("pairs") or {}
    if "maker" in makers:
        return MADE[makers["maker"]]
    if makers:
        return "; ".join(f"{name}: {MADE[options['maker']]}" for name, options in makers.items())
    return about.get("pairs") or NOT_RECORDED


def _findings(record: Mapping[str, Any]) -> list[list[str]] | None:
    """Set, severity, code and message of the errors and warnings of the pair check; None where it did not run."""
    sets = (record.get("data") or {}).get("pair_sets") or {}
    checked = {name: entry["findings"] for name, entry in sets.items() if isinstance(entry["findings"], list)}
    found = [
        [_in_one_line(name) if len(sets) > 1 else "", *map(_in_one_line, finding)]
        for name, findings in checked.items()
        for finding in findings
    ]
    return [finding for finding in found if finding[1] != "info"] if checked else None


def _recipe(record: Mapping[str, Any], shown: Mapping[str, Any]) -> str | None:
    """The settings that were given and those in the table, as YAML; None for a training without a recipe."""
    settings = {**record["settings"], "seed": record["seed"]}
    if "dataset" not in settings:
        return None
    names = dict.fromkeys(["dataset", "method", *(record.get("given") or settings), *shown, "warmup_steps"])
    if record["method"] in GUIDED:
        names["pair_loss_weight"] = None  # whose default was another before
    recipe = {"method": record["method"]}
    for name in names:
        value = settings.get(name)
        if value not in (None, NOT_RECORDED, {}, []) and not NO_SETTINGS.fullmatch(name):
            recipe[name] = value
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
