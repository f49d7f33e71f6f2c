# SPDX-License-Identifier: Apache-2.0
"""Data as users give it to the trainer: it is right, or an error before work starts names the set and the fix."""

from itertools import permutations

import datasets
import numpy as np
import pandas
import pytest
import small
import torch
from datasets import ClassLabel
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTImageProcessor

from ipg_hf.metrics import GroupMetrics, training_group_counts
from ipg_hf.pairs import AdversarialPairs, ImageRows
from ipg_hf.sets import check_names, pair_sets, with_attribute_ids

PROCESSOR = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})
N = 12
NAMES = ("cat", "dog")


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8))


def images(n=N, names=NAMES, attribute=None, seed=0, **columns):
    """Rows of noise with alternating classes."""
    columns = {"image": [noise((seed, i)) for i in range(n)], "label": [i % 2 for i in range(n)], **columns}
    features = {"image": ImageFeature(), "label": ClassLabel(names=list(names))}
    if attribute is not None:
        columns["attribute"] = [attribute[i // 2 % len(attribute)] for i in range(n)]
    made = datasets.Dataset.from_dict(columns)
    return made.cast(datasets.Features({**made.features, **features}))


def pairs(n=N, seed=50, **columns):
    sides = {f"image_{side}": [noise((seed, k, i)) for i in range(n)] for k, side in enumerate("ab")}
    return datasets.Dataset.from_dict({**sides, **columns})


def trainer(tmp_path, train=None, pair_dataset=None, **kwargs):
    model = kwargs.pop("model", None)
    given = {"max_steps": 2, "processing_class": PROCESSOR, **kwargs}
    return small.trainer(tmp_path, model, images() if train is None else train, pair_dataset or pairs(), **given)


# ---- What pair_dataset takes ----


def test_sets_of_pairs_by_name():
    one, stream = pairs(4), pairs(4).to_iterable_dataset()
    assert pair_sets(None, "pair_dataset") == {}
    for taken in (one, stream, AdversarialPairs(images(4)), small.pairs(4)):
        assert pair_sets(taken, "pair_dataset") == {"pairs": taken}
    assert pair_sets({"colour": one, "shape": stream}, "pair_dataset") == {"colour": one, "shape": stream}
    assert pair_sets(datasets.DatasetDict(colour=one, shape=one), "pair_dataset") == {"colour": one, "shape": one}
    assert pair_sets(datasets.DatasetDict(train=one), "pair_dataset") == {"pairs": one}


class Tuples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        return noise(row), noise(row + 1)


class Dicts(Tuples):
    def __getitem__(self, row):
        return dict(zip(("image_a", "image_b"), super().__getitem__(row), strict=True))


class Frame:
    columns, iloc = ["image_a", "image_b"], None


WRONG_FORMS = {
    "splits": (lambda: datasets.DatasetDict(train=pairs(4), test=pairs(4)), ["'train', 'test'", "pairs['train']"]),
    "splits in a dict": (lambda: {"colour": pairs(4), "validation": pairs(4)}, ["validation", "one split"]),
    "a test split": (lambda: datasets.DatasetDict(test=pairs(4)), ["'test'"]),
    "no set": (dict, ["empty dict", "None"]),
    "None in a dict": (lambda: {"colour": None}, ["pair_dataset['colour'] is None"]),
    "a key that is no text": (lambda: {0: pairs(4)}, ["the key 0"]),
    "tuples": (lambda: [(noise(0), noise(1))], ["rows are of type tuple", "from_list"]),
    "a set of tuples": (Tuples, ["Tuples", "tuple", "from_list"]),
    "a set of dicts of images": (Dicts, ["Dicts", "dicts of images", "from_list(list(pairs))"]),
    "tensors": (lambda: TensorDataset(torch.zeros(4, 3), torch.zeros(4, 3)), ["TensorDataset", "tuple"]),
    "an array": (lambda: np.zeros((4, 2, 8, 8)), ["ndarray"]),
    "columns": (lambda: {"image_a": [1], "image_b": [2]}, ["columns 'image_a', 'image_b'", "from_dict"]),
    "two sets": (lambda: (images(4), images(4)), ["tuple of 2 data sets"]),
    "a path": (lambda: "pairs/train", ["'pairs/train'", "load_dataset"]),
    "a table": (Frame, ["Frame", "from_list(frame.to_dict('records'))"]),
    "a loader": (lambda: DataLoader(small.pairs(4)), ["DataLoader", "loader.dataset"]),
    "an iterator": (lambda: iter([{}]), ["list_iterator"]),
    "a number": (lambda: 300, ["int"]),
    "paths of images": (lambda: [{"image_a": "a.png", "image_b": "b.png"}], ["dicts of images", "from_list"]),
    "one side": (lambda: [{"pixel_values": torch.zeros(3, 4, 4)}], ["dicts of 'pixel_values'"]),
    "numbers as names": (lambda: [{0: torch.zeros(3), 1: torch.zeros(3)}], ["dicts of 0, 1"]),
    "a class": (lambda: datasets.Dataset, ["type"]),
    "a dict in a dict": (lambda: {"colour": {"all": pairs(4)}}, ["pair_dataset['colour'] is a dict"]),
    "an empty list": (list, ["empty"]),
}


def test_the_advice_for_pairs_in_memory_works(tmp_path):
    """Each message names a call; what that call makes of the same pairs trains."""
    rows = [dict(row) for row in pairs(4)]
    for made in (
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list([{"image_a": a, "image_b": b} for a, b in [tuple(row.values()) for row in rows]]),
        datasets.Dataset.from_list(pandas.DataFrame(rows).to_dict("records")),
        datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}),
    ):
        assert made[3]["image_b"].tobytes() == rows[3]["image_b"].tobytes()
        trainer(tmp_path, pair_dataset=made)
    listed = datasets.Dataset.from_dict({"both": [[*row.values()] for row in rows]})
    for given in (listed, listed.to_iterable_dataset()):
        with pytest.raises(
            ValueError, match=r"pair_dataset has the columns 'both', but no 'image_a', .*: map\("
        ) as error:
            trainer(tmp_path, pair_dataset=given)
        advice = str(error.value).split(": ", 1)[1].removesuffix(".")
        trainer(tmp_path, pair_dataset=eval(f"given.{advice}", {"given": given}))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))] * 8)


def test_a_stream_of_tuples_is_named(tmp_path):
    with pytest.raises(ValueError, match="a row of the pair set is of type tuple: it must be a dict"):
        trainer(tmp_path, pair_dataset=Stream()).train()


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("make, words", [(lambda: iter([1]), "list_iterator"), (lambda: images().select([]), "empty")])
def test_sets_without_rows_or_an_order(tmp_path, argument, make, words):
    sets = {"train_dataset": images(), argument: make()}
    with pytest.raises(ValueError, match=f"{argument} is .*{words}"):
        small.IPGTrainer(small.vit(), small.config(tmp_path), processing_class=PROCESSOR, **sets)


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_what_is_no_set_of_pairs(tmp_path, form):
    make, words = WRONG_FORMS[form]
    with pytest.raises(ValueError, match="pair_dataset") as failure:
        small.IPGTrainer(small.vit(), small.config(tmp_path), train_dataset=images(), pair_dataset=make())
    assert all(word in str(failure.value) for word in words), failure.value
    with pytest.raises(ValueError, match="eval_pair_dataset"):
        pair_sets(make(), "eval_pair_dataset")


# ---- Classes by name ----


def test_every_order_of_names_but_the_same_is_refused():
    own = ("ant", "bee", "cow")
    for other in permutations(own):
        columns = {
            "label of train_dataset": ClassLabel(names=list(own)),
            "label of eval": ClassLabel(names=list(other)),
        }
        for kinds, model in ((columns, None), (dict([*columns.items()][:1]), other)):
            if other == own:
                check_names(kinds, model)
                continue
            with pytest.raises(ValueError, match="one number would mean different classes") as failure:
                check_names(kinds, model)
            assert "label of train_dataset" in str(failure.value)
            assert all(", ".join(map(repr, names)) in str(failure.value) for names in (own, other))
    check_names({"a": ClassLabel(names=["ant", "bee"]), "b": ClassLabel(names=list(own))}, own)  # some are not used
    check_names({"a": ClassLabel(names=list(own))}, ["0", "1", "2"])
    check_names({"a": ClassLabel(num_classes=3), "b": ClassLabel(names=list(own)), "c": datasets.Value("int64")}, own)


@pytest.mark.parametrize("order", [order for order in permutations("012") if order != ("0", "1", "2")])
def test_numbers_are_names_beside_the_same_numbers_in_another_order(order):
    numbers = ClassLabel(num_classes=3)
    for columns, model in (({"a": numbers, "b": ClassLabel(names=list(order))}, None), ({"a": numbers}, order)):
        with pytest.raises(ValueError, match="one number would mean different classes"):
            check_names(columns, model)


def test_one_name_in_two_unicode_forms_is_one_name(tmp_path):
    composed, parts = "w\u00e4rme", "wa\u0308rme"
    check_names({"a": ClassLabel(names=["ant", composed]), "b": ClassLabel(names=["ant", parts])}, ["ant", parts])
    with pytest.raises(ValueError, match="different classes"):
        check_names({"a": ClassLabel(names=["ant", composed]), "b": ClassLabel(names=[parts, "ant"])})


@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: f"{name} "])
def test_names_that_differ_in_capitals_or_spaces_are_no_other_classes(tmp_path, change):
    """A model of other classes gets the names of the data; one of the same classes in another order must not."""
    names = [change(name) for name in NAMES[::-1]]
    model = small.vit(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    with pytest.raises(ValueError, match=r"the model \(config.id2label\)"):
        trainer(tmp_path, model=model)


def test_the_sets_of_a_trainer_have_one_order(tmp_path):
    turned = NAMES[::-1]
    of_class = {"label": ClassLabel(names=list(turned))}
    labelled = pairs(label=[0] * N).cast_column("label", of_class["label"])
    sides = pairs(label_a=[0] * N, label_b=[0] * N).cast_column("label_b", of_class["label"])
    sides = sides.cast_column("label_a", ClassLabel(names=list(NAMES)))
    model = small.vit(id2label=dict(enumerate(turned)), label2id={name: i for i, name in enumerate(turned)})
    for wrong, title in (
        ({"eval_dataset": images(names=turned)}, "label of eval_dataset"),
        ({"eval_dataset": {"near": images(), "far": images(names=turned)}}, r"label of eval_dataset\['far'\]"),
        ({"pair_dataset": labelled}, "label of pair_dataset"),
        ({"pair_dataset": {"colour": pairs(), "shape": sides}}, r"label_b of pair_dataset\['shape'\]"),
        ({"model": model}, r"the model \(config.id2label\)"),
    ):
        with pytest.raises(ValueError, match=title):
            trainer(tmp_path, **wrong)
    trainer(tmp_path, images(names=turned), labelled, model=model, eval_dataset=images(names=turned))


def test_what_is_measured_later_has_the_order_of_training(tmp_path):
    turned = NAMES[::-1]
    held_out = pairs(label=[0] * N).cast_column("label", ClassLabel(names=list(turned)))
    run = trainer(tmp_path)
    too_large = without("label").add_column("label", [0] * (N - 1) + [2])
    for measure, title in ((run.evaluate, "the evaluation set"), (run.predict, "the test set")):
        measure(images(seed=1))
        with pytest.raises(ValueError, match=f"label of {title} 'dog', 'cat': one number would mean"):
            measure(images(names=turned))
        with pytest.raises(ValueError, match=f"{title} has the label 2 in row {N - 1}, out of range"):
            measure(too_large)
    run.evaluate_pairs(pairs(label=[0] * N).cast_column("label", ClassLabel(names=list(NAMES))))
    with pytest.raises(ValueError, match="label of pair_dataset 'dog', 'cat'"):
        run.evaluate_pairs(held_out)
    with pytest.raises(ValueError, match="pair_dataset has the label 2 in row 0, out of range"):
        run.evaluate_pairs(pairs(label=[2] * N))
    alone = small.IPGTrainer(
        small.vit(id2label=dict(enumerate(NAMES))), small.config(tmp_path), processing_class=PROCESSOR
    )
    with pytest.raises(ValueError, match="the model"):
        alone.evaluate(images(names=turned))


def test_a_model_of_other_classes_gets_the_names_of_the_training_set(tmp_path, caplog):
    """It is published under the names that it was trained on; a model with some of the names is refused above."""
    model = small.vit(id2label={0: "ant", 1: "bee"}, label2id={"ant": 0, "bee": 1})
    run = trainer(tmp_path, model=model)
    assert run.model.config.id2label == dict(enumerate(NAMES))
    assert run.model.config.label2id == {name: number for number, name in enumerate(NAMES)}
    assert all(name in caplog.text for name in ("'ant', 'bee'", "'cat', 'dog'", "train_dataset"))
    placeholders = trainer(tmp_path, model=small.vit())
    assert placeholders.model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_the_sides_of_pairs_and_the_sets_have_one_order_of_attributes(tmp_path):
    def kind(*names):
        return ClassLabel(names=list(names))

    swapped = pairs(attribute_a=[0] * N, attribute_b=[1] * N).cast_column("attribute_a", kind("red", "green"))
    swapped = swapped.cast_column("attribute_b", kind("green", "red"))
    with pytest.raises(ValueError, match="attribute_b of pair_dataset"):
        trainer(tmp_path, pair_dataset=swapped)
    train = images(attribute=[0, 1]).cast_column("attribute", kind("red", "green"))
    other = images(attribute=[0, 1]).cast_column("attribute", kind("green", "red"))
    with pytest.raises(ValueError, match="attribute of eval_dataset"):
        trainer(tmp_path, train, eval_dataset=other)


# ---- The attribute ----


def labels_seen(tmp_path, metrics_take_attributes, **kwargs):
    """The label_ids of an evaluation, and the columns that a user's compute_loss has seen."""
    given, columns = [], set()

    class OwnLoss(small.IPGTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            columns.update(inputs)
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    def metrics(prediction):
        given.append(prediction.label_ids)
        return {}

    if metrics_take_attributes:
        metrics.takes_attributes = True
    run = trainer(tmp_path, kind=OwnLoss, compute_metrics=metrics, **kwargs)
    run.train()
    run.evaluate()
    return given[0], columns


@pytest.mark.parametrize("remove", [True, False])
def test_only_metrics_that_ask_get_attributes(tmp_path, remove):
    sets = {"train": images(attribute=[0, 1]), "eval_dataset": images(attribute=[0, 1])}
    if not remove:
        sets = {"train": small.rows(N, attribute=True), "eval_dataset": small.rows(N, attribute=True)}
    plain, columns = labels_seen(tmp_path, False, **sets, remove_unused_columns=remove)
    assert plain.tolist() == [i % 2 for i in range(N)] and columns == {"pixel_values", "labels"}
    (labels, attributes), columns = labels_seen(tmp_path, True, **sets, remove_unused_columns=remove)
    assert labels.tolist() == plain.tolist() and attributes.tolist() == [i // 2 % 2 for i in range(N)]
    assert columns == {"pixel_values", "labels"}


@pytest.mark.parametrize("values", [["red", "green"], [3_000_000_001, 5], ["10", "9"], [1.0, 0.0]])
def test_texts_and_large_numbers_work_like_a_class_label(tmp_path, values):
    names = sorted((str(int(v)) if isinstance(v, float) else str(v) for v in values), key=lambda n: (len(n), n))
    names = ["green", "red"] if values[0] == "red" else names
    ids = [names.index(str(int(v)) if isinstance(v, float) else str(v)) for v in values]
    label = ClassLabel(names=names)
    found = []
    for column, cast in ((values, False), (ids, True)):
        # the evaluation set has one value only: its ids are those of the training set
        train, other = images(attribute=column), images(attribute=column[:1], seed=1)
        if cast:
            train, other = (part.cast_column("attribute", label) for part in (train, other))
        run = trainer(tmp_path, train, eval_dataset=other, compute_metrics=GroupMetrics(train), objective="group_dro")
        assert run.train_dataset.features["attribute"].names == names
        run.train()
        metrics = run.evaluate()
        found.append({k: v for k, v in metrics.items() if "time" not in k and "second" not in k})
        assert training_group_counts(train).tolist() == [[3, 3], [3, 3]]
    assert found[0] == found[1] and f"eval_group_accuracy/cat/{names[ids[0]]}" in found[0]


def test_attributes_are_numbered_alike_by_name():
    a, b = images(attribute=["sky", "sea"]), images(attribute=["ice", "sky"])
    changed, names = with_attribute_ids({"a": a, "b": b}, None)
    assert names == ["sea", "sky", "ice"]
    texts = {name: part.features["attribute"].int2str(part["attribute"][:]) for name, part in changed.items()}
    assert texts == {"a": a["attribute"][:], "b": b["attribute"][:]}
    assert with_attribute_ids({"b": b}, names)[0]["b"]["attribute"][:4] == [2, 2, 1, 1]
    plain = images(attribute=[0, 1])
    assert with_attribute_ids({"a": plain}, None) == ({"a": plain}, None)
    with pytest.raises(ValueError, match="attribute of b has the numbers '0', '1', that of a 'sea', 'sky'"):
        with_attribute_ids({"a": a, "b": plain}, None)
    # small numbers are names where the other set has large ones
    few, many = images(attribute=[7, 5]), images(attribute=[5, 7000, 7])
    assert with_attribute_ids({"many": many, "few": few}, None)[0]["few"]["attribute"][:4] == [1, 1, 0, 0]


@pytest.mark.parametrize("known, other", [([0, 1], ["land", "water"]), (["land", "water"], ["land", "sky"])])
def test_values_that_the_metrics_do_not_know_are_refused(tmp_path, known, other):
    """They would get the numbers, and the training counts, of other values."""
    train, wrong = images(attribute=known), images(attribute=other, seed=1)
    words = f"the attribute of .* has the values .*'{other[1]}', but the training set that compute_metrics was given"
    with pytest.raises(ValueError, match=f"{words} has '{known[0]}', '{known[1]}'"):
        trainer(tmp_path, train, eval_dataset=wrong, compute_metrics=GroupMetrics(train))
    run = trainer(tmp_path, train, eval_dataset=train, compute_metrics=GroupMetrics(train))
    run.evaluate()
    with pytest.raises(ValueError, match=words):
        run.predict(wrong)
    # the same numbers, as texts in another order
    alike = images(attribute=[str(value) for value in known][::-1])
    texts = trainer(tmp_path, train, eval_dataset=alike, compute_metrics=GroupMetrics(train)).eval_dataset
    assert texts["attribute"][:4] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "values, words",
    [([0, None], "missing .*row 2"), (["a", None], "missing .*row 2"), ([0, -1], "-1 in row 2"), ([0.5, 1.0], "0.5")],
)
def test_attributes_that_are_none(tmp_path, values, words):
    """They are refused at construction where they are needed, and else not read."""
    wrong = images(attribute=values)
    with pytest.raises(
        ValueError, match=f"attribute of eval_dataset.*{words}|{words}.*attribute of eval_dataset|{words}"
    ):
        trainer(tmp_path, eval_dataset=wrong, compute_metrics=GroupMetrics())
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, wrong, objective="reweight")
    run = trainer(
        tmp_path, wrong, eval_dataset=wrong, compute_metrics=lambda prediction: {"n": len(prediction.label_ids)}
    )
    run.train()
    assert run.evaluate()["eval_n"] == N


@pytest.mark.parametrize("form", ["stream", "rows"])
def test_texts_that_cannot_be_numbered_are_refused(tmp_path, form):
    texts = images(attribute=["sky", "sea"])
    given = texts.to_iterable_dataset()
    if form == "rows":
        given = ImageRows(texts, PROCESSOR, {"image": "pixel_values"}, keep=["label", "attribute"])
    with pytest.raises(
        ValueError, match=r"eval_dataset, of type .*, has texts as attribute, .*cast_column\('attribute'"
    ):
        trainer(tmp_path, eval_dataset=given, compute_metrics=GroupMetrics())
    trainer(tmp_path, eval_dataset=given, compute_metrics=lambda prediction: {})


def test_values_that_look_alike_are_said(caplog):
    with_attribute_ids({"a": images(attribute=["sky", "sea"]), "b": images(attribute=["Sky", "sea"])}, None)
    assert "'Sky', 'sky' differ only in capitals or spaces" in caplog.text


def test_a_table_by_group_has_the_size_of_the_values_that_occur():
    logits, labels = np.eye(2)[[0, 1, 1, 1]], np.array([0, 1, 0, 1])
    prediction = type("", (), {"predictions": logits, "label_ids": (labels, np.array([3_000_000_001, 5, 5, 7]))})
    found = GroupMetrics()(prediction)
    assert found["worst_group_accuracy"] == 0 and found["group_accuracy/0/5"] == 0
    assert found["group_accuracy/0/3000000001"] == found["group_accuracy/1/5"] == found["group_accuracy/1/7"] == 1


# ---- Columns ----


def without(column, dataset=None):
    return (images() if dataset is None else dataset).remove_columns(column)


def paths():
    return datasets.Dataset.from_dict({"image": ["a.png"] * 4, "label": [0, 1, 0, 1]})


def lists():
    return datasets.Dataset.from_dict({"image": [[[0] * 20] * 20] * 4, "label": [0, 1, 0, 1]})


def with_labels(values):
    return without("label").add_column("label", values)


WRONG_COLUMNS = {
    "image": (lambda: images().rename_column("image", "img"), ["'img'", "rename_column('img', 'image')"]),
    "label": (lambda: images().rename_column("label", "fine_label"), ["rename_column('fine_label', 'label')"]),
    "neither": (lambda: without("label", without("image", images(other=[0] * N))), ["'other'", "image"]),
    "paths": (paths, ["string", "cast_column('image', datasets.Image())"]),
    "lists": (lists, ["List", "Image.fromarray"]),
    "texts": (lambda: with_labels(["cat"] * N), ["texts", "class_encode_column('label')"]),
    "None": (lambda: with_labels([0, None] * (N // 2)), ["row 1", "None"]),
    "floats": (lambda: with_labels([0.0, 1.0] * (N // 2)), ["float", "cast_column"]),
    "no image": (lambda: images().cast_column("image", ImageFeature(decode=False)), None),
    "pairs": (pairs, ["pair_dataset"]),
    "rows of images": (lambda: [{"image": noise(0), "label": 0}], ["'image', 'label'", "from_list(list(rows))"]),
    "tuples": (lambda: [(noise(0), 0)], ["tuple", "from_list"]),
    "torch": (Tuples, ["tuple", "from_list"]),
    "a path": (lambda: "data/train", ["load_dataset"]),
}


@pytest.mark.parametrize("form", WRONG_COLUMNS)
@pytest.mark.parametrize("argument", ["train", "eval_dataset"])
def test_columns_that_are_not_found(tmp_path, form, argument):
    make, words = WRONG_COLUMNS[form]
    given = {argument: make(), "compute_metrics": lambda prediction: {}}
    if words is None:
        trainer(tmp_path, **given).train()
        return
    with pytest.raises(ValueError, match="train_dataset" if argument == "train" else "eval_dataset") as failure:
        trainer(tmp_path, **given)
    assert all(word in str(failure.value) for word in words), failure.value


def test_raw_images_need_an_image_processor(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset has raw images .*=AutoImageProcessor"):
        trainer(tmp_path, processing_class=None, pair_dataset=small.pairs(4))


@pytest.mark.parametrize("row", [0, 5, N - 1])
def test_a_missing_image_is_named(tmp_path, row):
    columns = images().cast_column("image", ImageFeature(decode=False))
    stored = [None if number == row else value for number, value in enumerate(columns["image"][:])]
    broken = without("image").add_column("image", stored, feature=ImageFeature())
    with pytest.raises(
        ValueError, match=rf"train_dataset has no image \(None\) in 1 of {N} rows, the first is row {row}"
    ):
        trainer(tmp_path, broken)
    trainer(tmp_path, broken.select([number for number in range(N) if number != row]))


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow"])
def test_a_format_changes_no_training(tmp_path, form):
    ends = []
    for make in (lambda dataset: dataset, lambda dataset: dataset.with_format(form)):
        run = trainer(tmp_path, make(images()), make(pairs()), eval_dataset=make(images(seed=3)))
        run.train()
        ends.append((small.weights(run.model), run.evaluate()["eval_loss"]))
    assert small.bit_equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_image_rows_name_their_columns(tmp_path):
    renamed = images().rename_column("image", "img")
    rows = ImageRows(renamed, PROCESSOR, {"img": "pixel_values"}, keep=["label"])
    trainer(tmp_path, rows, eval_dataset=rows).train()
    with pytest.raises(ValueError, match=r"train_dataset .* no 'label'"):
        trainer(tmp_path, ImageRows(renamed, PROCESSOR, {"img": "pixel_values"}))


def test_what_users_collate_themselves_is_theirs(tmp_path):
    def collate(rows):
        batch = PROCESSOR([image for image, _ in rows], return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in rows])}

    rows = [(noise(i), i % 2) for i in range(8)]
    trainer(tmp_path, rows, data_collator=collate, remove_unused_columns=False).train()

    class OwnLoader(small.IPGTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, 4, collate_fn=collate)

    trainer(tmp_path, rows, kind=OwnLoader).train()


# ---- Columns of pairs, and streams ----


def stream_of(dataset):
    return dataset.to_iterable_dataset()


WRONG_PAIRS = {
    "other names": (
        lambda: pairs().rename_columns({"image_a": "x", "image_b": "y"}),
        ["'x': 'image_a', 'y': 'image_b'"],
    ),
    "one other name": (lambda: pairs().rename_column("image_b", "y"), ["{'y': 'image_b'}"]),
    "single images": (images, ["overlay_pairs"]),
    "paths": (lambda: datasets.Dataset.from_dict({"image_a": ["a"], "image_b": ["b"]}), ["image_a", "Image()"]),
    "a stream of paths": (
        lambda: stream_of(datasets.Dataset.from_dict({"image_a": ["a"], "image_b": ["b"]})),
        ["image_a"],
    ),
    "a stream that is not decoded": (lambda: stream_of(pairs()).decode(False), ["image_a", "decode(True)"]),
    "a stream of nothing": (lambda: stream_of(pairs()).filter(lambda row: False), ["empty"]),
}


@pytest.mark.parametrize("form", WRONG_PAIRS)
def test_columns_of_pairs(tmp_path, form):
    make, words = WRONG_PAIRS[form]
    with pytest.raises(ValueError, match="pair_dataset") as failure:
        trainer(tmp_path, pair_dataset={"colour": make()})
    assert all(word in str(failure.value) for word in [*words, "'colour'"]), failure.value


@pytest.mark.parametrize(
    "labels, words",
    [
        (["cat"] * N, "texts"),
        ([0] * (N - 1) + [None], f"row {N - 1}"),
        ([0] * (N - 1) + [2], f"label 2 in row {N - 1}, out of range"),
        ([0] * (N - 1) + [-1], f"label -1 in row {N - 1}, out of range"),
        ([[0, 1]] * N, r"label \[0, 1\] in row 0, but a pair must have one class"),
        ([[1]] * N, r"label \[1\] in row 0, but a pair must have one class"),
    ],
)
def test_labels_of_held_out_pairs(tmp_path, labels, words):
    wrong = pairs(label=labels)
    trainer(tmp_path, pair_dataset=wrong, pair_loss_weight=0.0)  # the training then reads none of them
    with pytest.raises(ValueError, match=r"^pair_dataset|label of pair_dataset"):
        trainer(tmp_path, pair_dataset=wrong)
    with pytest.raises(ValueError, match=f"eval_pair_dataset.*{words}"):
        trainer(tmp_path, eval_pair_dataset=wrong)


class RawStream(torch.utils.data.IterableDataset):
    """What users write around files: rows of raw images, of which none is known before."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_of_raw_rows_is_named_and_the_advice_works(tmp_path):
    rows, raw_pairs = [dict(row) for row in images()], [dict(row) for row in pairs()]
    words = r"the training set has rows with 'image', 'label', .*IterableDataset.from_generator"
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, RawStream(rows)).train()
    with pytest.raises(ValueError, match=r"the training set has rows of type tuple, .*from_generator"):
        trainer(tmp_path, RawStream([tuple(row.values()) for row in rows])).train()
    for measure in ("evaluate", "predict"):
        with pytest.raises(ValueError, match=r"set has rows with 'image', 'label', .*from_generator"):
            getattr(trainer(tmp_path), measure)(RawStream(rows))
    with pytest.raises(ValueError, match=r"no columns pixel_values_a .*from_generator"):
        trainer(tmp_path, pair_dataset=RawStream(raw_pairs)).train()
    made, made_pairs = (datasets.IterableDataset.from_generator(lambda r=r: iter(r)) for r in (rows, raw_pairs))
    trainer(tmp_path, made, made_pairs).train()
    ready = [{"pixel_values": torch.zeros(3, small.SIZE, small.SIZE), "labels": 0}] * N
    trainer(tmp_path, RawStream(ready)).train()


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("column", ["label", "labels"])
def test_texts_that_a_transform_returns_as_labels_are_named(tmp_path, argument, column):
    def transformed(returned):
        def transform(batch):
            made = PROCESSOR(batch["image"], return_tensors="pt")
            return {**made, column: [returned(number) for number in batch["label"]]}

        return images().with_transform(transform)

    settings = {"kind": small.IPGTrainer, "remove_unused_columns": False, "compute_metrics": lambda prediction: {}}
    sets = {"train": transformed(int), "eval_dataset": transformed(int)}
    trainer(tmp_path, **sets, **settings).train()
    sets["train" if argument == "train_dataset" else argument] = transformed(lambda number: NAMES[number])
    with pytest.raises(ValueError, match=f"{argument} has the text 'cat' as {column} in row 0, after its transform"):
        trainer(tmp_path, **sets, **settings)
