# SPDX-License-Identifier: Apache-2.0
"""Faults in pair sets and labels are found before training, and named by their row."""

import io
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small import pairs
from transformers import ViTImageProcessor

from ipg_hf.pairs import PairCollator
from ipg_hf.pairs.checks import CHUNK, check_labels, check_pair_labels, check_pair_set, check_pair_stream
from ipg_hf.pairs.transforms import as_model_inputs

N = CHUNK + 50  # more than one chunk
ROW = CHUNK + 7  # the row at fault, in the second
SHAPE = (3, 4, 4)
collator = PairCollator({"pixel_values"})


def check(dataset, **kwargs):
    check_pair_set(dataset, "pair_dataset['color']", collator, **kwargs)


def rows(n=N):
    values = np.random.default_rng(0).random((2, n, *SHAPE), dtype=np.float32)
    return [
        {"pixel_values_a": torch.from_numpy(a), "pixel_values_b": torch.from_numpy(b)}
        for a, b in zip(*values, strict=True)
    ]


def stored(items, fixed=False):
    """The same rows as a data set that holds numbers, in nested lists or as an `Array3D`."""
    features = None
    if fixed:
        features = datasets.Features({f"pixel_values_{side}": datasets.Array3D(SHAPE, "float32") for side in "ab"})
        features |= {"source_id": datasets.Value("int64")} if "source_id" in items[0] else {}
    columns = {name: [torch.as_tensor(item[name]).numpy() for item in items] for name in items[0]}
    return datasets.Dataset.from_dict(columns, features)


def as_rows(items):
    return items


def as_lists(items):
    return stored(items)


def as_torch(items):
    return stored(items).with_format("torch")


def as_array(items):
    return stored(items, fixed=True).with_format("numpy")


def as_transform(items):
    return datasets.Dataset.from_dict({"i": list(range(len(items)))}).with_transform(
        lambda batch: {name: [items[i][name] for i in batch["i"]] for name in items[0]}
    )


KINDS = [as_rows, as_lists, as_torch, as_array, as_transform]


def png(size=(6, 5), mode="RGB", form="png", color=0):
    data = io.BytesIO()
    Image.new(mode, size, color).save(data, form)
    return {"bytes": data.getvalue(), "path": None}


def raw(n=N, row=None, **replaced):
    images = {"image_a": [png()] * n, "image_b": [png(color="white")] * n}
    for name, image in replaced.items():
        images[name][row] = image
    features = datasets.Features(dict.fromkeys(images, datasets.Image()))
    dataset = datasets.Dataset.from_dict(images, features)
    return as_model_inputs(dataset, ViTImageProcessor(size={"height": 4, "width": 4}), "pixel_values")


# ---- check_pair_set ----


@pytest.mark.parametrize("every_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_clean_sets_pass(kind, every_row):
    check(kind(rows()), every_row=every_row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "value"), [("a", float("nan")), ("b", float("-inf"))])
def test_values_that_are_not_finite(kind, side, value):
    items = rows()
    items[ROW][f"pixel_values_{side}"][1, 2, 3] = value
    with pytest.raises(
        ValueError, match=rf"pixel_values_{side} of row {ROW} of pair_dataset\['color'\] has NaN or inf"
    ):
        check(kind(items))
    check(kind(items), every_row=False)
    with pytest.raises(ValueError, match="row 0 of"):
        check(kind(items[ROW:]), every_row=False)


@pytest.mark.parametrize("kind", [as_rows, as_lists, as_transform])
def test_shapes_of_the_sides(kind):
    items = rows()
    items[ROW]["pixel_values_b"] = torch.zeros(3, 4, 2)
    message = (
        rf"pixel_values_a is torch.float32 \(3, 4, 4\) and pixel_values_b torch.float32 \(3, 4, 2\) in row {ROW} of"
    )
    with pytest.raises(ValueError, match=message):
        check(kind(items))


@pytest.mark.parametrize("kind", [as_rows, as_lists, as_transform])
@pytest.mark.parametrize("row", [1, ROW, slice(CHUNK, N)], ids=["1", "in the second chunk", "all of the second chunk"])
def test_shapes_of_the_rows(kind, row):
    items = rows()
    for i in range(N)[row] if isinstance(row, slice) else [row]:
        items[i] = {f"pixel_values_{side}": torch.zeros(3, 2, 2) for side in "ab"}
    first = CHUNK if isinstance(row, slice) else row
    with pytest.raises(ValueError, match=rf"\(3, 4, 4\) in row 0 and torch.float32 \(3, 2, 2\) in row {first} of"):
        check(kind(items))


@pytest.mark.parametrize("kind", [as_rows, as_transform])
def test_dtypes(kind):
    items = rows()
    items[ROW]["pixel_values_b"] = items[ROW]["pixel_values_b"].double()
    with pytest.raises(ValueError, match=rf"pixel_values_b torch.float64 \(3, 4, 4\) in row {ROW} of"):
        check(kind(items))


def test_nulls_in_stored_columns():
    columns = {f"pixel_values_{side}": [[1.0, 2.0], [3.0, None]] for side in "ab"}
    with pytest.raises((ValueError, TypeError)):
        check(datasets.Dataset.from_dict(columns).with_format("numpy"))


@pytest.mark.parametrize("kind", [as_rows, as_lists, as_torch, as_array, as_transform])
def test_the_source_is_named(kind):
    items = [{**item, "source_id": torch.tensor(1000 + i)} for i, item in enumerate(rows())]
    items[ROW]["pixel_values_a"].fill_(float("nan"))
    with pytest.raises(ValueError, match=rf"row {ROW} of pair_dataset\['color'\] \(source_id .*{1000 + ROW}"):
        check(kind(items))


def test_labels_of_a_pair():
    items = [{**item, "label_a": i % 2, "label_b": i % 2} for i, item in enumerate(rows())]
    check(items)
    items[ROW]["label_b"] = 5
    with pytest.raises(ValueError, match=rf"the labels of row {ROW} of .* differ: label_a={ROW % 2}, label_b=5"):
        check(items)
    check(items, every_row=False)


def test_sets_without_rows_or_columns():
    for empty in ([], raw(0), stored(rows(1)).select([])):
        with pytest.raises(ValueError, match="is empty: give it at least one pair"):
            check(empty)
    with pytest.raises(ValueError, match="no columns pixel_values_a and pixel_values_b"):
        check([{"pixel_values": torch.ones(SHAPE)}])
    with pytest.raises(ValueError, match="no columns pixel_values_a and pixel_values_b"):
        check([*rows(3), {"pixel_values_a": torch.ones(SHAPE)}])


def test_streams_are_checked_as_they_are_drawn():
    check(stored(rows(1)).to_iterable_dataset())
    check(datasets.Dataset.from_dict({"i": [0]}).to_iterable_dataset())


def test_random_transforms_leave_the_global_generators_alone():
    noisy = datasets.Dataset.from_dict({"i": list(range(9))}).with_transform(
        lambda batch: {f"pixel_values_{side}": [torch.rand(2) for _ in batch["i"]] for side in "ab"}
    )
    before = torch.get_rng_state()
    check(noisy)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (png((6, 6)), r"image_a is RGB of \(6, 5\) pixels and image_b RGB of \(6, 6\) in row 9 of"),
        (png(mode="L"), r"image_a is RGB of \(6, 5\) pixels and image_b L of \(6, 5\) in row 9 of"),
        ({"bytes": b"no image", "path": None}, "image_b of row 9 of .* cannot be read as an image: cannot identify"),
        (
            {"bytes": None, "path": "/nothing/here.png"},
            "image_b of row 9 of .* cannot be read as an image: .*No such file",
        ),
        (None, "image_b of row 9 of .* cannot be read as an image"),
    ],
    ids=["size", "mode", "bytes", "path", "null"],
)
def test_raw_images(image, message):
    check(raw())
    with pytest.raises(ValueError, match=message):
        check(raw(row=9, image_b=image))
    check(raw(row=9, image_b=image), every_row=False)
    with pytest.raises(ValueError, match="row 0 of"):
        check(raw(row=0, image_b=image), every_row=False)


def test_of_many_raw_images_some_are_looked_at_and_the_others_when_they_are_drawn(monkeypatch):
    monkeypatch.setattr("ipg_hf.pairs.checks.RAW_ROWS", 3)  # rows 0, 20 and 40 of 41
    monkeypatch.setattr("ipg_hf.pairs.linter.FAST_PAIRS", 2)
    for row in (0, 20, 40):
        with pytest.raises(ValueError, match=f"in row {row} of"):
            check(raw(41, row=row, image_b=png((6, 6))))
    dataset = raw(41, row=9, image_b=png((6, 6)))
    check(dataset)
    assert len(dataset.__getitems__([8, 10])) == 2
    with pytest.raises(ValueError, match=r"must have one size, .* in row 9"):
        dataset.__getitems__([8, 9])


def test_raw_images_in_files(tmp_path):
    for name, size in (("a", (6, 5)), ("b", (6, 5)), ("c", (5, 6))):
        Image.new("RGB", size, "black" if name == "a" else "white").save(tmp_path / f"{name}.png")
    processor = ViTImageProcessor(size={"height": 4, "width": 4})
    for other, faulty in (("b", False), ("c", True)):
        columns = {"image_a": [str(tmp_path / "a.png")], "image_b": [str(tmp_path / f"{other}.png")]}
        features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
        dataset = as_model_inputs(datasets.Dataset.from_dict(columns, features), processor, "pixel_values")
        if faulty:
            with pytest.raises(ValueError, match=r"image_b RGB of \(5, 6\) in row 0"):
                check(dataset)
        else:
            check(dataset)


def test_raw_columns_that_are_no_pairs_of_images():
    processor = ViTImageProcessor(size={"height": 4, "width": 4})
    single = datasets.Dataset.from_dict({"image": [png()]}, datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="no columns pixel_values_a and pixel_values_b"):
        check(as_model_inputs(single, processor, "pixel_values"))
    lists = datasets.Dataset.from_dict({"image_a": [[1.0]], "image_b": [[1.0]]})
    with pytest.raises(ValueError, match=r"column image_a of .* is a List, not an Image: .*cast_column\('image_a'"):
        check(as_model_inputs(lists, processor, "pixel_values"))


def test_checks_take_seconds_at_most():
    # measured: 1.2, 0.2 and 0.4 s; nested lists took 5 ms a row while each became a tensor
    image = torch.randn(3, 16, 16)
    many = [{"pixel_values_a": image, "pixel_values_b": image}] * 20_000
    lists = datasets.Dataset.from_dict(
        {f"pixel_values_{side}": image.expand(5_000, -1, -1, -1).numpy() for side in "ab"}
    )
    for dataset in (many, lists.with_format("torch"), raw(5_000)):
        start = time.process_time()
        check(dataset)
        assert time.process_time() - start < 5


# ---- check_pair_labels ----


def labelled(a, b, feature=None):
    features = None if feature is None else datasets.Features({"label_a": feature, "label_b": feature})
    return datasets.Dataset.from_dict({"label_a": a, "label_b": b}, features)


@pytest.mark.parametrize("feature", [None, datasets.ClassLabel(names=["x", "y", "z"])])
def test_pair_labels(feature):
    check_pair_labels(labelled([0, 1, 2], [0, 1, 2], feature), "pairs")
    with pytest.raises(ValueError, match=r"within 2 of 4 pairs of pairs, first in row 1: label_a=1, label_b=0\."):
        check_pair_labels(labelled([0, 1, 2, 0], [0, 0, 2, 1], feature), "pairs")


def test_pair_labels_that_are_words_or_absent():
    with pytest.raises(ValueError, match="first in row 1: label_a=y, label_b=z"):
        check_pair_labels(labelled(["x", "y"], ["x", "z"]), "pairs")
    for other in (datasets.Dataset.from_dict({"label_a": [1]}), [{"label_a": 1, "label_b": 2}], None):
        check_pair_labels(other, "pairs")


# ---- What the linter's fast form finds is logged, or raised where it is an error ----


def test_findings_are_logged(caplog):
    def logged(dataset, **kwargs):
        caplog.clear()
        check(dataset, **kwargs)
        return {record.getMessage().split("[")[2].split("]")[0] for record in caplog.records}

    few = [{**row, "label": 0, "attribute_a": 0, "attribute_b": 1} for row in rows(5)]
    assert logged(stored(few)) == {"few-pairs", "one-label"}
    assert logged(stored(few), every_row=False) == set()
    assert logged(stored(rows(20))) == set()
    # a set that says nothing of labels but the model inputs, some of whose names begin alike
    assert logged(stored([{**row, "label_text": 0, "source_id": 1} for row in rows(20)])) == set()
    assert "pair-repeated" in logged(raw(20))
    assert logged(raw(20), every_row=False) == set()


def test_errors_of_the_linter_stop(caplog):
    same = stored([{**row, "label": 0, "attribute_a": 1, "attribute_b": 1} for row in rows(5)])
    message = r"(?s)color.*error \[attribute-same\].*rows: 0, 1, 2, 3, 4.*To train all the same, set check_pairs=False"
    with pytest.raises(ValueError, match=message):
        check(same)
    assert any("one-label" in record.getMessage() for record in caplog.records)  # the warnings are logged before
    check(same, every_row=False)
    with pytest.raises(ValueError, match=r"(?s)error \[sides-identical\].*rows: 3\n"):
        check(raw(20, row=3, image_b=png()))
    check(raw(20, row=3, image_b=png()), every_row=False)


def test_a_stream_is_looked_at_in_its_beginning(caplog):
    drawn = []

    def counted(row):
        drawn.append(1)
        return row

    def stream_of(images):
        return images.to_iterable_dataset().map(counted, features=images.features)

    images = raw(20).dataset
    stream = stream_of(images)
    check_pair_stream(stream, "pairs", every_row=False)
    assert not drawn and not caplog.records
    check_pair_stream(stream, "pairs")
    assert len(drawn) == 20
    assert any("pair-repeated" in record.getMessage() for record in caplog.records)
    assert all(record.getMessage().startswith("the first 20 pairs of pairs: ") for record in caplog.records)
    assert next(iter(stream))["image_a"].size == (6, 5)  # it is as it was
    caplog.clear()
    for other in (images, stored(rows(20)).to_iterable_dataset(), iter([])):
        check_pair_stream(other, "pairs")
    assert not caplog.records
    with pytest.raises(ValueError, match=r"(?s)the first 20 pairs of pairs.*\[sides-identical\].*check_pairs=False"):
        check_pair_stream(stream_of(raw(20, row=3, image_b=png()).dataset), "pairs")


# ---- check_labels ----


@pytest.mark.parametrize("column", ["label", "labels", "label_ids"])
@pytest.mark.parametrize("kind", ["int64", "int8", "uint8"])
def test_labels_out_of_range(column, kind):
    def of(labels):
        return datasets.Dataset.from_dict({column: labels}, datasets.Features({column: datasets.Value(kind)}))

    check_labels(of([0, 1, 2]), "train_dataset", 3)
    message = rf"train_dataset has the {column} 3 in row 2, out of range for a model of 3 labels \(0 to 2\)"
    with pytest.raises(ValueError, match=message):
        check_labels(of([0, 1, 3, 4]), "train_dataset", 3)
    check_labels(of([0, 1, 3, 4]), "train_dataset", None)
    if kind != "uint8":
        check_labels(of([0, -100, 2]), "train_dataset", 3)
        with pytest.raises(ValueError, match=f"the {column} -1 in row 1"):
            check_labels(of([0, -1, 2]), "train_dataset", 3)


def test_class_labels_and_formats():
    names = datasets.Features({"label": datasets.ClassLabel(names=["x", "y", "z"])})
    dataset = datasets.Dataset.from_dict({"label": [0, 1, 2]}, names)
    for other in (dataset, dataset.with_format("torch")):
        check_labels(other, "train_dataset", 3)
        with pytest.raises(ValueError, match="the label 2 in row 2"):
            check_labels(other, "train_dataset", 2)


def test_labels_that_are_not_class_numbers():
    for column in ([0.5, 7.0], [[0, 1, 1], [1, 0, 0]], ["x", "y"]):
        check_labels(datasets.Dataset.from_dict({"label": column}), "train_dataset", 2)
    parity = datasets.Dataset.from_dict({"label": [7, 8]}).with_transform(lambda batch: {"label": [7 % 2, 8 % 2]})
    check_labels(parity, "train_dataset", 2)  # the stored labels are not those that the model gets
    check_labels([{"label": 7}], "train_dataset", 2)


def test_clean_pairs_of_the_other_tests_pass():
    check(pairs(5))


def test_whole_numbers_to_regress_on_are_no_classes():
    dataset = datasets.Dataset.from_dict({"label": [0, 7, -3]})
    check_labels(dataset, "train_dataset", 1)
    with pytest.raises(ValueError, match="out of range"):
        check_labels(dataset, "train_dataset", 2)
