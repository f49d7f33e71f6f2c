# SPDX-License-Identifier: Apache-2.0
"""Training sets with the counterpart of each image, and recipes that take their pairs from the batch."""

import json

import datasets
import numpy as np
import pytest
import yaml
from small import TINY_RECIPE

from ipg_hf.cli import main
from ipg_hf.data import load_digits
from ipg_hf.pairs import with_counterparts

RECIPE = {**TINY_RECIPE, "rationale_reduction": "pair", "max_steps": 4, "logging_steps": 2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def digits():
    return load_digits(num_pairs=997)


def test_the_counterpart_is_the_other_side_of_the_images_pair(digits):
    found = with_counterparts(digits.train, digits.pairs)
    assert found.column_names == ["image", "label", "attribute", "image_b"]
    assert isinstance(found.features["image_b"], datasets.Image) and len(found) == len(digits.train) == 997
    for row in found.select(range(20)):
        image, other = (np.asarray(row[name]) for name in ("image", "image_b"))
        channel = row["attribute"]  # 0 red, 1 green; the other is black
        assert image[..., channel].any() and not image[..., 1 - channel].any()
        np.testing.assert_array_equal(other[..., 1 - channel], image[..., channel])
        assert not other[..., channel].any()


def test_pairs_in_another_order_and_with_swapped_sides(digits):
    mixed = load_digits(num_pairs=997, oriented_pairs=False).pairs.shuffle(seed=1)
    ours, theirs = (with_counterparts(digits.train, pairs)["image_b"][:] for pairs in (digits.pairs, mixed))
    assert all(a == b for a, b in zip(ours, theirs, strict=True))


def test_files_are_known_by_their_paths(digits, tmp_path):
    names = []
    for number, image in enumerate(digits.train.select(range(4))["image"]):
        names.append(str(tmp_path / f"{number}.png"))
        image.save(names[-1])
    train = datasets.Dataset.from_dict({"image": names[:2]}).cast_column("image", datasets.Image())
    pairs = datasets.Dataset.from_dict({"image_a": names[1::-1], "image_b": names[:1:-1]})
    for column in pairs.column_names:
        pairs = pairs.cast_column(column, datasets.Image())
    found = with_counterparts(train, pairs).cast_column("image_b", datasets.Image(decode=False))
    assert [row["path"] for row in found["image_b"]] == names[2:]


def test_an_image_in_no_pair(digits):
    with pytest.raises(
        ValueError, match=r"but 996 of 997 are in none of the 1 pairs, first that of row [01]: .*num_pairs"
    ):
        with_counterparts(digits.train, digits.pairs.select([0]))


def run(folder, name, **settings):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / name), **settings}))
    status = main(["train", "--config", str(path)])
    record = folder / name / "run.json"
    return json.loads(record.read_text()) if status == 0 else status


def test_a_recipe_with_pairs_in_the_batch(tmp_path, capsys):
    ours = run(tmp_path, "batch", num_pairs=997, pair_source="batch", compare="erm")
    drawn = run(tmp_path, "drawn", num_pairs=997)
    plain = run(tmp_path, "plain", method="erm", pair_source="batch", num_pairs=997)
    assert ours["course"]["guidance"]["step"] == [2, 4] and ours["data"]["pair_sets"] == {}
    measured = [record["metrics"]["test"]["divergence"] for record in (ours, drawn, plain)]
    assert len({round(value, 9) for value in measured}) == 3
    # without the method there are no pairs, in the batch or elsewhere
    twin = json.loads((tmp_path / "batch/erm/run.json").read_text())
    assert twin["metrics"] == plain["metrics"] and "guidance" not in plain["course"]
    capsys.readouterr()
    assert run(tmp_path, "few", num_pairs=40, pair_source="batch") == 2
    assert "957 of 997 are in none of the 40 pairs" in capsys.readouterr().err
    assert run(tmp_path, "several", dataset="marked_digits", num_pairs=None, pair_source="batch") == 2
    assert "marked_digits has several sets" in capsys.readouterr().err
