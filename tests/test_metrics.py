# SPDX-License-Identifier: Apache-2.0
"""Group metrics against numbers worked by hand."""

import re

import datasets
import evaluate
import numpy as np
import pytest
import small
import torch
from PIL import Image
from transformers import EvalPrediction, ViTImageProcessor

from ipg_hf.evaluate_metrics import Accuracy, FlipRate, GroupAccuracy
from ipg_hf.metrics import (
    METRICS,
    WORST_GROUP,
    GroupErrors,
    GroupMetrics,
    group_accuracy,
    group_counts,
    read_attributes,
    training_group_counts,
)

# groups (0,0): 3 of 4 right; (0,1): 1 of 2; (1,0): none; (1,1): 1 of 1
REFERENCES = [0, 0, 0, 0, 0, 0, 1]
ATTRIBUTES = [0, 0, 0, 0, 1, 1, 1]
PREDICTIONS = [0, 0, 1, 0, 1, 0, 1]
ROWS = {"predictions": PREDICTIONS, "references": REFERENCES, "attributes": ATTRIBUTES}
# by training sizes 10, 30, 50, 60 of the groups that have rows: (10*.75 + 30*.5 + 60*1) / 100
TRAIN_COUNTS = [10, 30, 50, 60]
ADJUSTED = 0.825


def logits_for(predictions):
    return np.eye(2, dtype=np.float32)[predictions] * 3 - 1


def train_set(labels, attributes, **features):
    columns = {"label": labels, "attribute": attributes}
    whole = datasets.Dataset.from_dict(columns)
    for name, names in features.items():
        whole = whole.cast_column(name, datasets.ClassLabel(names=names))
    return whole


def test_counts_by_hand():
    counts = group_counts(np.array(REFERENCES), np.array(ATTRIBUTES), 2, 2)
    assert counts.tolist() == [[4, 2], [0, 1]]
    assert counts.sum() == len(REFERENCES)


def test_summary_by_hand():
    correct, counts = np.array([[3.0, 1.0], [0.0, 1.0]]), np.array([[4.0, 2.0], [0.0, 1.0]])
    summary = group_accuracy(correct, counts, np.array([[10.0, 30.0], [50.0, 60.0]]))
    assert summary == {"worst_group_accuracy": 0.5, "adjusted_accuracy": pytest.approx(ADJUSTED)}
    # the empty group (1, 0) is not a worst group of accuracy 0, and no weight of its own moves the mean
    assert group_accuracy(correct, counts, np.array([[10, 30], [0, 60]])) == summary
    assert "adjusted_accuracy" not in group_accuracy(correct, counts)
    assert "adjusted_accuracy" not in group_accuracy(correct, counts, np.array([[0, 0], [5, 0]]))


def test_adjusted_equals_plain_where_the_shares_agree():
    rng = np.random.default_rng(0)
    labels, attributes, predictions = rng.integers(0, 3, (3, 200))
    counts = group_counts(labels, attributes, 3, 3)
    correct = group_counts(labels, attributes, 3, 3, weights=predictions == labels)
    plain = (labels == predictions).mean()
    assert group_accuracy(correct, counts, 7 * counts)["adjusted_accuracy"] == pytest.approx(plain, abs=1e-12)
    assert group_accuracy(correct, counts, counts[::-1])["adjusted_accuracy"] != pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_group_accuracy_metric(kind):
    metric = GroupAccuracy(train_group_counts=TRAIN_COUNTS, num_attributes=2)
    expected = {
        "worst_group_accuracy": 0.5,
        "adjusted_accuracy": pytest.approx(ADJUSTED),
        "group_accuracy/0/0": 0.75,
        "group_n/0/0": 4.0,
        "group_accuracy/0/1": 0.5,
        "group_n/0/1": 2.0,
        "group_accuracy/1/1": 1.0,
        "group_n/1/1": 1.0,
    }
    # twice: nothing of a first call may stay for the second
    for _ in range(2):
        result = metric.compute(**{name: kind(values) for name, values in ROWS.items()})
        assert result == expected
        assert all(type(value) is float for value in result.values())


def test_names_and_table_of_counts():
    metric = GroupAccuracy(
        train_group_counts=[[10, 30], [50, 60]], label_names=["land", "water"], attribute_names=["left", "right"]
    )
    result = metric.compute(**ROWS)
    assert result["adjusted_accuracy"] == pytest.approx(ADJUSTED)
    assert result["group_accuracy/land/right"] == 0.5
    assert "group_n/water/left" not in result


def test_batches_add_up_to_one_call():
    metric = GroupAccuracy()
    for start in range(0, 7, 3):
        metric.add_batch(**{name: values[start : start + 3] for name, values in ROWS.items()})
    assert metric.compute() == GroupAccuracy().compute(**ROWS)


def test_metrics_are_combined():
    assert Accuracy().compute(predictions=PREDICTIONS, references=REFERENCES) == {"accuracy": pytest.approx(5 / 7)}
    result = evaluate.combine([Accuracy(), GroupAccuracy(), FlipRate()]).compute(**ROWS)
    assert result["accuracy"] == pytest.approx(5 / 7) and result["worst_group_accuracy"] == 0.5
    assert result["flip_rate"] == pytest.approx(2 / 7)
    with pytest.raises(ValueError, match="no rows"):
        Accuracy().compute(predictions=[], references=[])


class Corner(small.ViTForImageClassification):
    """A model whose prediction stands in the image: label 1 if the first pixel is bright."""

    def forward(self, pixel_values, **kwargs):
        bright = pixel_values[:, 0, 0, 0]
        return small.ImageClassifierOutput(logits=torch.stack([-bright, bright], 1))


def corner_images():
    shades = [np.full((16, 16, 3), 255 * prediction, np.uint8) for prediction in PREDICTIONS]
    rows = {"image": [Image.fromarray(shade) for shade in shades], "label": REFERENCES, "attribute": ATTRIBUTES}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture
def evaluator():
    """`evaluate.evaluator` on a model in memory, nothing fetched."""
    model = Corner(small.vit().config)

    def run(metric, data, **settings):
        return evaluate.evaluator("image-classification").compute(
            model,
            data,
            metric=metric,
            feature_extractor=ViTImageProcessor(size={"height": 16, "width": 16}),
            label_mapping=model.config.label2id,
            device=-1,
            **settings,
        )

    return run


def test_the_evaluator_of_evaluate_gives_the_metrics_of_a_training(evaluator):
    """By hand: 3 of 4, 1 of 2 and 1 of 1 are right, by training sizes 10, 30 and 60."""
    labels, attributes = np.divmod(np.repeat([0, 1, 2, 3], TRAIN_COUNTS), 2)
    metrics = GroupMetrics(train_set(labels, attributes, attribute=["left", "right"]))
    data = corner_images()
    result = evaluator(metrics.combined(data), data)
    assert result.pop("total_time_in_seconds") > 0
    result = {name: value for name, value in result.items() if name not in ("samples_per_second", "latency_in_seconds")}
    assert result == metrics(EvalPrediction(logits_for(PREDICTIONS), (np.array(REFERENCES), np.array(ATTRIBUTES))))
    assert result["group_accuracy/0/right"] == 0.5 and result["adjusted_accuracy"] == pytest.approx(ADJUSTED)


def test_rows_that_are_not_those_of_the_evaluated_set_are_refused(evaluator):
    data = corner_images()
    with pytest.raises(ValueError, match="the references are not the labels of the evaluated set"):
        evaluator(GroupMetrics().combined(data), data.select(range(7)[::-1]))
    # a bootstrap draws rows whose attributes are not known any more
    with pytest.raises(ValueError, match="use strategy='simple'"):
        evaluator(GroupMetrics().combined(data), data, strategy="bootstrap", n_resamples=5)


def test_the_table_of_metrics_names_what_is_measured():
    prediction = EvalPrediction(logits_for(PREDICTIONS), (np.array(REFERENCES), np.array(ATTRIBUTES)))
    found = GroupMetrics(train_set([0, 1], [0, 1]))(prediction) | FlipRate().compute(predictions=[1], references=[0])
    regression = datasets.Dataset.from_dict({"label": [0.0, 1.0]})
    found |= GroupErrors(regression)(EvalPrediction(np.zeros((2, 1)), (np.array([0.0, 1.0]), np.array([0, 1]))))
    of_sets = {name for name in found if not name.startswith("group_")}
    assert of_sets | {"difference", "pair_accuracy"} == set(METRICS) and set(WORST_GROUP) < set(METRICS)
    assert [name for name, metric in METRICS.items() if metric.direction == "higher"] == [
        "accuracy",
        "worst_group_accuracy",
        "adjusted_accuracy",
        "pair_accuracy",
    ]
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": [], "references": [], "attributes": []}, "no rows"),
        ({"predictions": [0, 1]}, "2 predictions, 7 references"),
        ({"attributes": [0, 0, 0, 0, 1, 1, 2]}, "attribute out of range: 2 in row 6"),
        ({"attributes": [0, -1, 0, 0, 1, 1, 1]}, "attribute out of range: -1 in row 1"),
        ({"references": [0, 0, 0, 5, 0, 0, 1]}, "label out of range: 5 in row 3"),
        ({"predictions": [0.4, 0.2, 0.9, 0, 1, 0, 1]}, "predictions must be one integer a row"),
        ({"predictions": logits_for(PREDICTIONS)}, r"float32 of shape \(7, 2\)"),
    ],
)
def test_group_accuracy_refuses(change, message):
    metric = GroupAccuracy(num_attributes=2, label_names=["a", "b"])
    with pytest.raises(ValueError, match=message):
        metric.compute(**{**ROWS, **change})
    # and is of use afterwards
    assert metric.compute(**ROWS)["worst_group_accuracy"] == 0.5


def test_missing_attributes_are_named():
    with pytest.raises(ValueError, match="attributes"):
        GroupAccuracy().compute(predictions=[0], references=[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_group_counts": [1, 2, 3, 4]}, "need num_attributes"),
        ({"train_group_counts": [1, 2, 3], "num_attributes": 2}, "multiple"),
        ({"train_group_counts": [[1, 2, 3]], "num_attributes": 1}, "num_attributes=1"),
        ({"train_group_counts": [1, -2], "num_attributes": 2}, "negative"),
    ],
)
def test_wrong_train_counts(settings, message):
    with pytest.raises(ValueError, match=message):
        GroupAccuracy(**settings)


def test_flip_rate():
    assert FlipRate().compute(predictions=[0, 1, 2, 2], references=[0, 2, 2, 1]) == {"flip_rate": 0.5}
    assert FlipRate().compute(predictions=[1, 1], references=[1, 1]) == {"flip_rate": 0.0}
    with pytest.raises(ValueError, match="no pairs"):
        FlipRate().compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        FlipRate().compute(predictions=[1], references=[1, 0])


def test_group_metrics_without_attributes():
    prediction = EvalPrediction(predictions=logits_for(PREDICTIONS), label_ids=np.array(REFERENCES))
    assert GroupMetrics()(prediction) == {"accuracy": pytest.approx(5 / 7)}


@pytest.mark.parametrize("as_tuple", [False, True])
def test_group_metrics_with_attributes(as_tuple):
    logits = logits_for(PREDICTIONS)
    labels = (np.array(REFERENCES), np.array(ATTRIBUTES))
    prediction = EvalPrediction(predictions=(logits, np.zeros((7, 3))) if as_tuple else logits, label_ids=labels)
    expected = {"accuracy": pytest.approx(5 / 7), **GroupAccuracy().compute(**ROWS)}
    assert GroupMetrics()(prediction) == expected


def test_group_metrics_of_a_training_set():
    labels, attributes = np.divmod(np.repeat([0, 1, 2, 3], TRAIN_COUNTS), 2)
    named = train_set(labels, attributes, label=["land", "water"], attribute=["left", "right"])
    prediction = EvalPrediction(
        predictions=logits_for(PREDICTIONS), label_ids=(np.array(REFERENCES), np.array(ATTRIBUTES))
    )
    result = GroupMetrics(named)(prediction)
    assert result["adjusted_accuracy"] == pytest.approx(ADJUSTED)
    assert result["group_n/land/left"] == 4.0
    plain = GroupMetrics(train_set(labels, attributes))(prediction)
    assert plain["adjusted_accuracy"] == pytest.approx(ADJUSTED)
    assert plain["group_n/0/0"] == 4.0
    without = GroupMetrics(named.remove_columns("attribute"))(prediction)
    assert "adjusted_accuracy" not in without
    assert without["group_n/land/0"] == 4.0


def test_group_metrics_does_not_decode_images():
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}] * 2, "label": [0, 1], "attribute": [0, 1]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("int64"), "attribute": datasets.Value("int64")}
        ),
    )
    assert GroupMetrics(broken).settings["train_group_counts"].tolist() == [[1, 0], [0, 1]]


def test_ignored_rows():
    logits = np.concatenate([logits_for(PREDICTIONS), np.full((2, 2), np.nan, np.float32)])
    labels = (np.array([*REFERENCES, -100, -100]), np.array([*ATTRIBUTES, -100, 9]))
    expected = {"accuracy": pytest.approx(5 / 7), **GroupAccuracy().compute(**ROWS)}
    assert GroupMetrics()(EvalPrediction(logits, labels)) == expected
    assert GroupMetrics()(EvalPrediction(logits, labels[0])) == {"accuracy": pytest.approx(5 / 7)}


@pytest.mark.parametrize("with_attributes", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, labels: (np.where(np.arange(7)[:, None] < 3, np.nan, logits), labels), "3 of 7 rows are NaN"),
        (lambda logits, labels: (logits, np.full(7, -100)), "no rows to measure"),
        (lambda logits, labels: (logits[:5], labels), "5 logits, 7 labels"),
        (lambda logits, labels: (logits[:, 0], labels), r"shape \(N, C\)"),
    ],
)
def test_group_metrics_refuses(change, message, with_attributes):
    logits, labels = change(logits_for(PREDICTIONS), np.array(REFERENCES))
    with pytest.raises(ValueError, match=message):
        GroupMetrics()(EvalPrediction(logits, (labels, np.array(ATTRIBUTES)) if with_attributes else labels))


@pytest.mark.parametrize("values", [[2**64 - 1, 5], [2**63, 2**63 - 1], [1001, 2]])
def test_numbers_without_a_sign_are_names_at_any_size(values):
    train = datasets.Dataset.from_dict({"label": [0, 1, 0]}).add_column(
        "attribute", np.array(values + values[:1], "u8")
    )
    ids, names = read_attributes(train)
    assert names == [str(value) for value in sorted(values)]
    assert [names[number] for number in ids] == [str(value) for value in values + values[:1]]
    assert training_group_counts(train).sum(0).tolist() == [1, 2]


@pytest.mark.parametrize("value", [1e300, float("inf"), -1e19, 0.5])
def test_floats_that_are_no_whole_numbers_are_named(value):
    with pytest.raises(ValueError, match=re.escape(f"the attribute has the value {value!r}, but must be")):
        read_attributes(train_set([0, 1], [1.0, value]))


def test_an_attribute_that_fits_no_column_is_refused():
    with pytest.raises(ValueError, match=f"attributes have the value {2**63}, too large for an int64"):
        GroupAccuracy().compute(**{**ROWS, "attributes": np.array([*ATTRIBUTES[:-1], 2**63], np.uint64)})


def test_group_metrics_refuses_an_unknown_attribute():
    metrics = GroupMetrics(train_set([0, 1], [0, 1], attribute=["left", "right"]))
    with pytest.raises(ValueError, match="attribute out of range: 2 in row 0"):
        metrics(EvalPrediction(logits_for([0]), (np.array([0]), np.array([2]))))


@pytest.mark.parametrize("wrong", [[{"label": 0}], datasets.Dataset.from_dict({"y": [0]})])
def test_group_metrics_needs_labels_to_count(wrong):
    with pytest.raises(ValueError, match="column 'label'"):
        GroupMetrics(wrong)
