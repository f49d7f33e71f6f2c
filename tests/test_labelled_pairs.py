# SPDX-License-Identifier: Apache-2.0
"""`pair_loss_weight`: the corrective update descends on d + w · the task loss of both sides of labelled pairs."""

import datasets
import pytest
import small
import torch
import torch.nn.functional as F
from small import bit_equal, descending, differences, logged, weights

from ipg_hf.baselines import PairPenaltyTrainer

WEIGHT = 0.7
LABELS = (0, 1, -100, 1)


def labelled(labels=LABELS, seed=1):
    pairs = small.pairs(len(labels), seed, torch.float64)
    return [{**pair, "label": label} for pair, label in zip(pairs, labels, strict=True)]


def run(folder, pair_dataset=None, **settings):
    """Two steps of a float64 model by SGD, with all pairs in each."""
    pair_dataset = labelled() if pair_dataset is None else pair_dataset
    training, around = descending(folder, None, pair_dataset, **{"max_steps": 2, **small.SCALED, **settings})
    training.train()
    return training, around


def ended(folder, pair_dataset=None, **settings):
    return weights(run(folder, pair_dataset, **settings)[0].model)


def corrected_by_hand(before, pairs, distance, loss_of, build=small.vit):
    """The weights after a step of gradient descent on d + 0.7 · the loss of both sides."""
    model = build().double()
    model.load_state_dict(before)
    sides = torch.stack([pair[f"pixel_values_{side}"] for side in "ab" for pair in pairs])
    labels = torch.tensor([pair["label"] for pair in pairs] * 2)
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(sides).logits
    d, _ = small.distance_by_hand(distance, model.classifier.weight, seen[0], logits)
    (d + WEIGHT * loss_of(logits, labels)).backward()
    return {name: p.detach() - small.RATE * (0 if p.grad is None else p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("distance", small.DISTANCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_corrective_update_is_that_of_the_distance_and_the_loss(tmp_path, distance, smoothing):
    """Rows labelled -100 have no part in the loss, nor in its mean."""
    settings = {**small.DISTANCES[distance], "label_smoothing_factor": smoothing}
    training, around = run(tmp_path, pair_loss_weight=WEIGHT, **settings)
    for (before, _), (middle, _) in zip(around.before, around.middle, strict=True):
        wanted = corrected_by_hand(
            before,
            labelled(),
            distance,
            lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing),
        )
        assert differences(middle, wanted) < 1e-9
    # the norm of step 4 is that of the whole corrective gradient; d is logged without the loss
    moves = [(around.middle[0][0][name] - value).square().sum() for name, value in around.before[0][0].items()]
    entry, plain = (logged(training)[0], logged(run(tmp_path, pair_loss_weight=0.0, **settings)[0])[0])
    assert entry["ipg/corrective_grad_norm"] == pytest.approx(sum(moves).sqrt().item() / small.RATE, rel=1e-6)
    assert entry["ipg/corrective_grad_norm"] > 1.1 * plain["ipg/corrective_grad_norm"]
    assert entry["ipg/distance"] == plain["ipg/distance"]


def test_labels_are_used_where_pairs_have_them_and_the_weight_is_not_0(tmp_path):
    plain = ended(tmp_path, small.pairs(4, dtype=torch.float64))
    assert bit_equal(plain, ended(tmp_path, labelled(), pair_loss_weight=0.0))
    by_default = ended(tmp_path, labelled())
    assert not bit_equal(plain, by_default)
    assert bit_equal(by_default, ended(tmp_path, labelled(), pair_loss_weight=1.0))
    assert not bit_equal(by_default, ended(tmp_path, labelled(), pair_loss_weight=WEIGHT))


def test_pairs_of_which_no_label_is_known_are_pairs_without_labels(tmp_path):
    unknown = ended(tmp_path, labelled((-100,) * 4), pair_loss_weight=WEIGHT)
    assert bit_equal(unknown, ended(tmp_path, small.pairs(4, dtype=torch.float64)))


@pytest.mark.parametrize("distance", small.DISTANCES)
@pytest.mark.parametrize("build", [small.vit, small.deit_with_teacher])
def test_chunks_and_accumulation_change_nothing(tmp_path, distance, build):
    settings = {"build": build, "pair_loss_weight": WEIGHT, **small.DISTANCES[distance], **small.SCALED}
    whole = ended(tmp_path, **settings)
    assert differences(whole, ended(tmp_path, pair_chunk_size=1, **settings)) < 1e-9
    assert differences(whole, ended(tmp_path, pair_chunk_size=3, **settings)) < 1e-9
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert differences(whole, ended(tmp_path, **accumulated, **settings)) < 1e-6
    assert differences(whole, ended(tmp_path, labelled((1, 0, 0, 0)), **settings)) > 1e-5  # the control


def test_several_sets_correct_along_the_mean_of_their_gradients(tmp_path):
    sets = {"colour": labelled(), "frame": labelled((1, 1, -100, -100), seed=7)}
    moved = {}
    for name, chosen in {"both": sets, **{name: {name: pairs} for name, pairs in sets.items()}}.items():
        _, around = run(tmp_path, chosen, max_steps=1, pair_loss_weight=WEIGHT)
        moved[name] = {key: around.middle[0][0][key] - value for key, value in around.before[0][0].items()}
    wanted = {key: (moved["colour"][key] + moved["frame"][key]) / 2 for key in moved["both"]}
    assert differences(moved["both"], wanted) < 1e-12 and differences(moved["colour"], moved["frame"]) > 1e-5


def test_a_stream_gives_the_labels_of_its_pairs(tmp_path):
    rows = [{name: torch.as_tensor(value).tolist() for name, value in pair.items()} for pair in labelled()]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    tensors = {name: torch.float64 for name in ("pixel_values_a", "pixel_values_b")}
    stream = stream.map(lambda row: {n: torch.as_tensor(row[n], dtype=kind) for n, kind in tensors.items()})
    streamed = run(tmp_path, stream.with_format("torch"), pair_loss_weight=WEIGHT, max_steps=1)
    stored = run(tmp_path, pair_loss_weight=WEIGHT, max_steps=1)
    ends = [around.middle[0][0] for _, around in (streamed, stored)]
    assert differences(*ends) < 1e-6  # the format makes float32 of the pixels
    without = run(tmp_path, stream.remove_columns("label").with_format("torch"), max_steps=1)
    unread = run(tmp_path, stream.with_format("torch"), pair_loss_weight=0.0, max_steps=1)
    ends = [around.middle[0][0] for _, around in (without, unread)]
    assert bit_equal(*ends) and differences(ends[0], streamed[1].middle[0][0]) > 1e-5


def test_one_set_has_labels_and_the_other_none(tmp_path):
    other = small.pairs(4, 7, torch.float64)
    moved = {}
    for name, chosen in {
        "both": {"with": labelled(), "without": other}, "with": labelled(), "without": other
    }.items():  # fmt: skip
        _, around = run(tmp_path, chosen, max_steps=1, pair_loss_weight=WEIGHT)
        moved[name] = {key: around.middle[0][0][key] - value for key, value in around.before[0][0].items()}
    wanted = {key: (moved["with"][key] + moved["without"][key]) / 2 for key in moved["both"]}
    assert differences(moved["both"], wanted) < 1e-12 and differences(moved["both"], moved["without"]) > 1e-5


@pytest.mark.parametrize("label", [None, "no column"])
def test_a_label_that_is_missing_in_a_later_row_is_named(tmp_path, label):
    pairs = labelled()
    pairs[2] = {**pairs[2], "label": None} if label is None else small.pairs(4, dtype=torch.float64)[2]
    with pytest.raises(ValueError, match=r"no label in row .* of the batch.*-100 where it is not known"):
        run(tmp_path, pairs)


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_other_problem_types(tmp_path, kind):
    outputs = 1 if kind == "regression" else 3
    generator = torch.Generator().manual_seed(0)

    def labels_of(rows, name):
        values = [torch.rand(outputs, generator=generator, dtype=torch.float64) for _ in rows]
        values = [value[0] if outputs == 1 else value.round() for value in values]
        return [{**row, name: value} for row, value in zip(rows, values, strict=True)]

    train = labels_of(small.rows(16, dtype=torch.float64), "labels")
    pairs = labels_of(small.pairs(4, dtype=torch.float64), "label")
    gradients = {}
    for weight in (0.0, WEIGHT, 2 * WEIGHT):
        training, around = descending(
            tmp_path, train, pairs, lambda: small.vit(outputs), max_steps=1, pair_loss_weight=weight
        )
        training.train()
        gradients[weight] = {
            name: (value - around.middle[0][0][name]) / small.RATE for name, value in around.before[0][0].items()
        }
    model = small.vit(outputs).double()
    logits = model(torch.stack([pair[f"pixel_values_{side}"] for side in "ab" for pair in pairs])).logits
    labels = torch.stack([pair["label"] for pair in pairs] * 2).view(-1, outputs)
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    loss(logits, labels).backward()
    for weight in (WEIGHT, 2 * WEIGHT):
        added = {name: gradients[weight][name] - gradients[0.0][name] for name in gradients[weight]}
        wanted = {name: weight * p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert differences({name: added[name] for name in wanted}, wanted) < 1e-9


# ---- What cannot work is refused before training ----


def stored(labels, feature=None):
    pairs = [{"pixel_values_a": [0.0], "pixel_values_b": [1.0], "label": label} for label in labels]
    pairs = datasets.Dataset.from_list(pairs)
    return pairs if feature is None else pairs.cast_column("label", feature)


def named(*names):
    return datasets.ClassLabel(names=list(names))


@pytest.mark.parametrize(
    ("pair_dataset", "words"),
    [
        (stored([0, 2]), ["pair_dataset", "label 2 in row 1", "out of range"]),
        (stored([0, -1]), ["pair_dataset", "label -1 in row 1"]),
        (stored(["yes", "no"]), ["pair_dataset has texts as label"]),
        ([{**pair, "label": None} for pair in small.pairs(4)], ["no label in row 0", "-100"]),
        ([{**pair, "label": 0.5} for pair in small.pairs(4)], ["label 0.5 in row 0", "an integer"]),
        ([{**pair, "label": [0, 1]} for pair in small.pairs(4)], ["label [0, 1] in row 0", "an integer"]),
    ],
    ids=["too large", "negative", "texts", "none", "float", "list"],
)
def test_pairs_with_a_label_that_gives_no_loss(tmp_path, pair_dataset, words):
    with pytest.raises(ValueError) as error:
        small.trainer(tmp_path, pair_dataset=pair_dataset)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("kind", "words"), [("regression", "1 outputs"), ("multi-label", "3 labels, 0 or 1 each")])
def test_labels_of_pairs_have_the_form_of_those_of_images(tmp_path, kind, words):
    outputs = 1 if kind == "regression" else 3
    train = [{**row, "labels": torch.zeros(outputs).squeeze()} for row in small.rows(8)]
    wrong = [{**pair, "label": [0.0, 1.0]} for pair in small.pairs(4)]
    with pytest.raises(ValueError, match=words):
        small.trainer(tmp_path, model=small.vit(outputs), train=train, pair_dataset=wrong)
    small.trainer(tmp_path, model=small.vit(outputs), train=train, pair_dataset=wrong, pair_loss_weight=0.0)


def test_pairs_number_their_classes_as_the_training_set_does(tmp_path):
    train = small.grouped()  # no, yes
    for names in (("no", "yes"), ("yes", "no")):
        pixels = {f"pixel_values_{side}": [torch.zeros(3, 16, 16).tolist()] * 2 for side in "ab"}
        pairs = datasets.Dataset.from_dict({**pixels, "label": [0, 1]})
        pairs = pairs.cast_column("label", named(*names))
        if names == ("no", "yes"):
            small.trainer(tmp_path, train=train, pair_dataset=pairs, pair_loss_weight=1.0)
            continue
        with pytest.raises(ValueError, match=r"no.*yes"):
            small.trainer(tmp_path, train=train, pair_dataset=pairs, pair_loss_weight=1.0)


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_weights_out_of_range(tmp_path, weight):
    with pytest.raises(ValueError, match=f"pair_loss_weight={weight} is not valid"):
        small.config(tmp_path, pair_loss_weight=weight)


def test_a_penalty_on_pairs_has_no_loss_beside_it(tmp_path):
    ends = []
    for weight in (0.0, 1.0):
        pairs = [{**pair, "label": 1} for pair in small.pairs(4)]
        training = small.trainer(tmp_path, pair_dataset=pairs, kind=PairPenaltyTrainer, pair_loss_weight=weight)
        training.train()
        ends.append(weights(training.model))
    assert bit_equal(*ends)
