# SPDX-License-Identifier: Apache-2.0
"""Audits one model, or two side by side, on a benchmark: accuracy by group, flips of pairs, and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data import Benchmark
from ..guidance import invariance_divergence
from ..heads import ClassifierHead, find_head
from ..inference import inference, logits_of
from ..metrics import METRICS, GroupMetrics, group_counts
from ..models import forward_inputs, model_inputs
from ..pairs import ImageRows
from ..pairs.checks import named_sets
from ..pairs.classes import model_names, shown
from ..pairs.makers import known_values
from ..pairs.preview import ShownPair, shown_pairs
from ..record import commit, versions
from ..seeding import seeded
from .numbers import (
    DRAWS,
    combined_interval,
    linear_probe,
    paired_difference,
    projection,
    rationale_differences,
    training_course,
    wilson_interval,
)

WORST_PAIRS = 6  # of each model and pair set


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model on N images.

    Args:
        logits: logits, float64 (N, C).
        z: inputs of the head, float32 (N, D); None if no head was found.
    """

    logits: np.ndarray
    z: np.ndarray | None


@dataclass(frozen=True)
class Measured:
    """The outputs of a model on a benchmark.

    Args:
        images: outputs on the split that is audited.
        fit: outputs on the split that the probes are fitted on.
        pairs: outputs on side a and on side b of each held-out pair set.
        weight: W of the head, float64 (C, D), or None.
        facts: facts about the model for the report. `no_head` is the reason if the model has no head that can be used.
    """

    images: Outputs
    fit: Outputs
    pairs: dict[str, tuple[Outputs, Outputs]]
    weight: np.ndarray | None
    facts: dict[str, Any]


def audit(
    models: Mapping[str, tuple[str, nn.Module, Any]],
    data: Benchmark,
    *,
    split: str = "test",
    dataset: str = "",
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[dict[str, Any], dict[str, list[ShownPair]]]:
    """Measures one or two classifiers on a split of a benchmark. Nothing is written.

    Args:
        models: name -> (folder or Hub id, classifier, image processor). A second model is compared with the first.
        data: the benchmark. Its labels are classes. Without an attribute, a group is a class. Probes are fitted on
            validation if the split is test, and on test if the split is validation.
        split: `"test"` or `"validation"`.
        dataset: name of the benchmark, for the report.
        seed: seed of the bootstrap and of the rows that are drawn, not negative.
        device: device on which the models run.
        batch_size: number of images in a forward.
        num_workers: number of processes that load images.

    Returns:
        The report, which holds plain values only, and the pictures of its pairs: pair set -> pairs.
        [`~page.write_report`] writes both.

    Raises:
        ValueError: the labels are no classes; a row has no label or no attribute; a model returns NaN, or has the same
            labels in another order.
    """
    kind = data.train.features["label"]
    if not isinstance(kind, datasets.ClassLabel):
        raise ValueError(
            f"an audit counts right and wrong classes, but the labels of {dataset or 'this benchmark'} are numbers "
            "(a regression): ipg evaluate without --report gives the errors by group."
        )
    data = _with_attribute(data)
    for place, model, _ in models.values():
        _check_order(place, getattr(model, "config", None), kind.names)
    held_out = {k: v for k, v in named_sets(getattr(data, f"{split}_pairs")).items() if v is not None}
    titles = {"images": split, "fit": "test" if split == "validation" else "validation"}
    sets = {key: getattr(data, title) for key, title in titles.items()}
    truth = {
        key: tuple(known_values(part, column, titles[key]).astype(np.int64) for column in ("label", "attribute"))
        for key, part in sets.items()
    }
    settings = {"device": device, "batch_size": batch_size, "num_workers": num_workers}
    measured = {
        name: _measure(model, processor, sets, held_out, **settings) for name, (_, model, processor) in models.items()
    }
    is_stored = isinstance(data.train, datasets.Dataset)  # of a stream the sizes of groups are not known
    metrics = GroupMetrics(data.train if is_stored else data.validation)
    if not is_stored:
        metrics.settings["train_group_counts"] = None
    if "attribute" not in data.train.column_names:  # training does not read it
        metrics.settings |= {"attribute_names": data.attribute_names, "num_attributes": len(data.attribute_names)}
    entries = []
    for name, (place, _, _) in models.items():
        entry = {"name": name, "model": place, **measured[name].facts}
        entry |= _accuracies(measured[name].images.logits, *truth["images"], metrics)
        entry["pairs"] = {key: _pair_figures(*sides) for key, sides in measured[name].pairs.items()}
        entry |= _features(measured[name], truth, seed, kind.names)
        entries.append(entry | {"training": training_course(place)})
    cards, pictures = {}, {}
    for key, pairs in held_out.items():
        scores = {name: _scores(*outputs.pairs[key]) for name, outputs in measured.items()}
        cards[key], pictures[key] = _worst_pairs(pairs, scores, kind.names)
    result = {
        "dataset": dataset,
        "split": split,
        "seed": seed,
        "draws": DRAWS,
        "images": len(sets["images"]),
        "labels": kind.names,
        "attributes": [str(name) for name in _attribute_names(metrics)],
        "fit_split": titles["fit"],
        "models": entries,
        "difference": _difference(measured, truth["images"], metrics, seed) if len(models) == 2 else None,
        "pairs": {key: {"sides": _sides(pairs), "cards": cards[key]} for key, pairs in held_out.items()},
        "versions": versions(),
        "commit": commit(),
    }
    return result, pictures


def named_models(places: Sequence[str]) -> dict[str, str]:
    """Gives folders or Hub ids different names: their last parts, or else the whole, or else the whole and a number."""
    for names in ([Path(place).resolve().name for place in places], places):
        if len({*names}) == len(places):
            return dict(zip(names, places, strict=True))
    return {f"{place} ({number + 1})": place for number, place in enumerate(places)}


def _check_order(place: str, config: Any, names: Sequence[str]) -> None:
    own = model_names(config)
    if own is not None and own != [*names]:
        raise ValueError(
            f"{place} orders its labels [{shown(own)}], the data [{shown(names)}]: answers would be counted as others. "
            "Give the data's ClassLabel the names and the order of the model (cast_column), or the model's head and "
            "id2label those of the data."
        )


def _with_attribute(data: Benchmark) -> Benchmark:
    """The benchmark with one value of the attribute, the empty text, for all images, if validation or test has none."""
    if all("attribute" in part.column_names for part in (data.validation, data.test)):
        return data
    kind = datasets.ClassLabel(names=[""])
    parts = {}
    for name in ("train", "validation", "test"):
        part = getattr(data, name)
        if not isinstance(part, datasets.Dataset):
            continue
        part = part.remove_columns([column for column in ("attribute",) if column in part.column_names])
        parts[name] = part.add_column("attribute", np.zeros(len(part), np.int64)).cast_column("attribute", kind)
    return replace(data, **parts)


# ---- Forwards ----


def _measure(
    model: nn.Module, processor: Any, sets: Mapping[str, Any], pairs: Mapping[str, Any], **settings: Any
) -> Measured:
    # half-precision weights give half-precision features: intervals and shares are computed in float64
    model = model.to(settings["device"])
    rows = ImageRows(sets["images"].select(range(min(2, len(sets["images"])))), processor, {"image": _main(model)})
    head, problem = _proven_head(
        model, model_inputs(model, next(iter(DataLoader(rows, 2, generator=torch.Generator()))), settings["device"])
    )
    with torch.no_grad(), inference(model), seeded(0):
        outputs = {key: _run(model, head, processor, part, "image", **settings) for key, part in sets.items()}
        sides = {
            key: tuple(_run(model, head, processor, part, f"image_{side}", **settings) for side in "ab")
            for key, part in pairs.items()
        }
    facts = {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "head": ", ".join(head.paths) if head else None,
        "features": head.weight.shape[1] if head else None,
        "no_head": problem,
    }
    weight = head.weight.detach().double().cpu().numpy() if head else None
    return Measured(**outputs, pairs=sides, weight=weight, facts=facts)


def _main(model: nn.Module) -> str:
    return forward_inputs(model)[0]


def _proven_head(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[ClassifierHead | None, str | None]:
    try:
        head = find_head(model, None, inputs)
        head.verify(model, inputs)
    except ValueError as failure:
        return None, str(failure)
    return head, None


def _run(
    model: nn.Module,
    head: ClassifierHead | None,
    processor: Any,
    dataset: datasets.Dataset,
    column: str,
    *,
    device: Any,
    batch_size: int,
    num_workers: int,
) -> Outputs:
    raw = dataset.with_format(None).select_columns([column])
    rows = ImageRows(
        raw if column == "image" else raw.rename_column(column, "image"), processor, {"image": _main(model)}
    )
    loader = DataLoader(rows, batch_size, num_workers=num_workers, generator=torch.Generator())
    logits, features = [], []
    for batch in loader:
        batch = model_inputs(model, batch, device)
        values, z = head.run(model, batch) if head else (logits_of(model(**batch)), None)
        logits.append(values.double().cpu())
        features += [] if z is None else [z.float().cpu()]
    return Outputs(torch.cat(logits).numpy(), torch.cat(features).numpy() if features else None)


# ---- Figures of one model ----


def _attribute_names(metrics: GroupMetrics) -> Sequence[Any]:
    return metrics.settings["attribute_names"] or range(metrics.settings["num_attributes"])


def _accuracies(
    logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray, metrics: GroupMetrics
) -> dict[str, Any]:
    # the metrics that training and ipg evaluate give; they check the values too
    summary = metrics(SimpleNamespace(predictions=logits, label_ids=(labels, attributes)))
    names = metrics.settings["label_names"], [str(name) for name in _attribute_names(metrics)]
    shape = tuple(map(len, names))
    counts = group_counts(labels, attributes, *shape)
    right = group_counts(labels, attributes, *shape, weights=logits.argmax(1) == labels)
    groups, sizes = [], metrics.settings["train_group_counts"]
    for label, attribute in np.argwhere(counts > 0):
        part = _share(int(right[label, attribute]), int(counts[label, attribute]), "accuracy")
        trained = None if sizes is None else int(sizes[label, attribute])
        groups.append({"label": names[0][label], "attribute": names[1][attribute], **part, "n_train": trained})
    return {
        "metrics": {name: summary[name] for name in METRICS if name in summary},
        "accuracy": _share(int(right.sum()), len(labels), "accuracy"),
        "adjusted": _adjusted(summary, groups),
        "worst_group": min(groups, key=lambda group: group["accuracy"]),
        "groups": groups,
        "empty_groups": int((counts == 0).sum()),
    }


def _adjusted(summary: Mapping[str, float], groups: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    if "adjusted_accuracy" not in summary:
        return None
    trained = sum(group["n_train"] for group in groups)
    low, high = combined_interval(
        *([group[key] for group in groups] for key in ("count", "n")),
        [group["n_train"] / trained for group in groups],
    )
    return {"accuracy": summary["adjusted_accuracy"], "low": low, "high": high}


def _share(count: int, total: int, name: str) -> dict[str, Any]:
    low, high = wilson_interval(count, total)
    return {"n": total, "count": count, name: count / total, "low": low, "high": high}


def _scores(a: Outputs, b: Outputs) -> dict[str, np.ndarray]:
    """For each pair: `divergence`, `flipped`, and for both sides the predicted `class_*` with its `probability_*`."""
    by_row = torch.vmap(lambda a, b: invariance_divergence(a[None], b[None]))
    scores = {"divergence": by_row(*(torch.from_numpy(side.logits) for side in (a, b))).numpy()}
    for side, outputs in (("a", a), ("b", b)):
        scores[f"class_{side}"] = outputs.logits.argmax(1)
        scores[f"probability_{side}"] = torch.from_numpy(outputs.logits).softmax(-1).amax(-1).numpy()
    return scores | {"flipped": scores["class_a"] != scores["class_b"]}


def _pair_figures(a: Outputs, b: Outputs) -> dict[str, Any]:
    scores = _scores(a, b)
    return {
        **_share(int(scores["flipped"].sum()), len(scores["flipped"]), "flip_rate"),
        "divergence": float(scores["divergence"].mean()),
    }


def _features(
    measured: Measured, truth: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: int, names: Sequence[str]
) -> dict[str, Any]:
    """Probes, projection and rationale differences of the input of the head; each is None without a head."""
    if measured.weight is None:
        return {"probes": None, "projection": None, "rationales": None}
    z, fit_z = measured.images.z, measured.fit.z
    labels, attributes = truth["images"]
    probes = {
        "label": linear_probe((fit_z, *truth["fit"]), (z, labels, attributes), seed=seed),
        "attribute": linear_probe((fit_z, *truth["fit"][::-1]), (z, attributes, labels), seed=seed),
    }
    rationales = {
        key: rationale_differences(measured.weight, a.z, b.z, names) for key, (a, b) in measured.pairs.items()
    }
    return {"probes": probes, "projection": projection(z, labels, attributes, seed=seed), "rationales": rationales}


# ---- Two models, and pairs ----


def _difference(
    measured: Mapping[str, Measured], truth: tuple[np.ndarray, np.ndarray], metrics: GroupMetrics, seed: int
) -> dict[str, dict[str, float]]:
    """The differences of the metrics, first model minus second, on the same images and the same pairs."""
    first, second = measured.values()
    groups = truth[0] * len(_attribute_names(metrics)) + truth[1]
    right = [outputs.images.logits.argmax(1) == truth[0] for outputs in (first, second)]
    found = paired_difference(*right, groups, seed=seed)
    for key in first.pairs:
        flips = [_scores(*outputs.pairs[key])["flipped"] for outputs in (first, second)]
        alone = paired_difference(*flips, np.zeros(len(flips[0]), np.int64), seed=seed)["accuracy"]
        found[f"flip_rate/{key}" if len(first.pairs) > 1 else "flip_rate"] = alone
    return found


def _sides(pairs: datasets.Dataset) -> list[str] | None:
    """The attribute values of side a and side b; None if a side has no value, or more than one."""
    found = []
    for column in ("attribute_a", "attribute_b"):
        kind = pairs.features.get(column)
        values = [*{*pairs[column][:]}] if kind is not None else []
        if len(values) != 1 or values[0] in (None, -1):
            return None
        found.append(kind.names[values[0]] if isinstance(kind, datasets.ClassLabel) else str(values[0]))
    return found


def _worst_pairs(
    pairs: datasets.Dataset, scores: Mapping[str, Mapping[str, np.ndarray]], names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[ShownPair]]:
    """The pairs of largest divergence under each model: their entries in the report, and their pictures."""
    chosen: dict[int, str] = {}
    for name, values in scores.items():
        rest = [row for row in np.argsort(-values["divergence"], kind="stable").tolist() if row not in chosen]
        chosen |= dict.fromkeys(rest[:WORST_PAIRS], name)
    cards, pictures = [], []
    for (row, name), pair in zip(chosen.items(), shown_pairs(pairs, [*chosen]), strict=True):
        predictions = {}
        for model, values in scores.items():
            sides = {side: {"class": names[values[f"class_{side}"][row]]} for side in "ab"}
            for side in "ab":
                sides[side]["probability"] = float(values[f"probability_{side}"][row])
            predictions[model] = {**sides, "divergence": float(values["divergence"][row])}
        flipped = bool(scores[name]["flipped"][row])
        answers = {model: _answer(part) for model, part in predictions.items()}
        pair = replace(pair, facts={**pair.facts, **answers}, flipped=flipped)
        texts = {key: getattr(pair, key) for key in ("row", "label", "place", "captions", "notes", "facts", "flipped")}
        cards.append({"worst_of": name, **texts, "predictions": predictions})
        pictures.append(pair)
    return cards, pictures


def _answer(prediction: Mapping[str, Any]) -> str:
    sides = [f"{prediction[side]['class']} {prediction[side]['probability']:.3f}" for side in "ab"]
    return f"{' → '.join(sides)}, divergence {prediction['divergence']:.3g}"
