# SPDX-License-Identifier: Apache-2.0
"""CelebA, whether a face has blond hair; the spurious attribute is whether the person is a man.

Sources: Liu et al., "Deep Learning Face Attributes in the Wild", ICCV 2015 (the images); Sagawa et al., arXiv
1911.08731, and its code (label and attribute).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np

from .benchmark import Benchmark
from .locate import find_folder, labelled, load_hub_set

LABEL = datasets.ClassLabel(names=["not_blond", "blond"])
ATTRIBUTE = datasets.ClassLabel(names=["female", "male"])
COLUMNS = ("Blond_Hair", "Male")

HUB_SET = "flwrlabs/celeba"
HUB_SPLITS = ("train", "valid", "test")  # 0, 1, 2 of the partition
FOLDERS = ("celeba", "celebA", "celebA_v1.0", "celebA/data")
# as on Kaggle and in WILDS, as torchvision unpacks it, and as on the authors' page
ATTRIBUTES = ("list_attr_celeba.csv", "list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
PARTITION = ("list_eval_partition.csv", "list_eval_partition.txt", "Eval/list_eval_partition.txt")
IMAGES = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")

WAYS = (
    "Give the folder of CelebA (img_align_celeba, list_attr_celeba and list_eval_partition as .csv or .txt) as "
    f"data_dir, or let the Hub set {HUB_SET} be loaded, some 12 GB: connect to the internet and give no data_dir. A "
    "benchmark that needs no data: recipes/digits/ipg_vit_tiny.yaml."
)


def load_celeba(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """Reads CelebA with the label Blond_Hair and the attribute Male. For non-commercial research only.

    - Image: RGB, 178×218 pixels, aligned faces. Label: 0 "not_blond", 1 "blond". Attribute: 0 "female", 1 "male".
      Group: 2·label + attribute, as in group DRO's code.
    - The authors' own split: 162,770 images for training, of which 1,387 are blond men (arXiv 1911.08731), 19,867 for
      validation, which chooses, and 19,962 for test. All three have the groups in about the same shares.
    - Pairs: none, and none held out: there is no second photograph with the other attribute alone. A maker makes pairs
      for training: `pairs: {maker: match, match_on: features, max_per_group: 5000}` takes two persons of one label; the
      cap is needed, matching 70,000 with 67,000 images takes more memory than machines have.

    The files are looked for in `data_dir` or in a folder `celeba`, `celebA`, `celebA_v1.0` or `celebA/data` in it, or
    else in such a folder where the environment variable IPG_DATA points: `img_align_celeba/`,
    `list_attr_celeba.csv` (or `.txt`) with values -1 and 1, and `list_eval_partition.csv` (or `.txt`) with values 0
    training, 1 validation, 2 test; also in the sub-folders Img, Anno and Eval, as its authors give them out. Where
    there is no `data_dir` and no such folder, the Hub set `flwrlabs/celeba` is loaded (columns image and 40 attributes,
    true or false; splits train, valid and test).

    Args:
        data_dir: the folder.
        seed: not used: nothing is drawn.
        num_pairs: not used, as there are no pairs; a maker takes it.
        oriented_pairs: not used either.

    Raises:
        FileNotFoundError: the files, or an image that they name, are missing.
        ValueError: a table lacks an attribute or has another value, or the two name different images.
    """
    folder = find_folder(data_dir, FOLDERS, ATTRIBUTES, WAYS)
    if folder is None:
        hub = load_hub_set(HUB_SET, ("image", *COLUMNS), HUB_SPLITS, WAYS)
        train, validation, test = (
            labelled(
                hub[split],
                *(np.asarray(hub[split][name][:]) for name in COLUMNS),
                LABEL,
                ATTRIBUTE,
                f"{split} of {HUB_SET}",
            )
            for split in HUB_SPLITS
        )
    else:
        train, validation, test = _read_folder(folder)
    return Benchmark(train, validation, test, pairs=None, validation_pairs=None, test_pairs=None)


def _read_folder(folder: Path) -> Iterable[datasets.Dataset]:
    attributes, partition, images = (_one_of(folder, names) for names in (ATTRIBUTES, PARTITION, IMAGES))
    (names, ids), (others, (split,)) = _read_table(attributes, COLUMNS), _read_table(partition, ["partition"])
    if names != others:
        raise ValueError(f"{attributes} and {partition} do not name the same images in the same order.")
    for column, values in zip(COLUMNS, ids, strict=True):
        wrong = set(np.unique(values).tolist()) - {-1, 1}
        if wrong:
            raise ValueError(f"{column} of {attributes} has the values {sorted(wrong)}, but must be -1 or 1.")
    wrong = set(np.unique(split).tolist()) - {0, 1, 2}
    if wrong:
        raise ValueError(f"{partition} has the values {sorted(wrong)}, but must be 0, 1 or 2.")
    there = {*os.listdir(images)}
    lost = [name for name in names if name not in there]
    if lost:
        raise FileNotFoundError(
            f"{images} lacks {len(lost)} of {len(names)} images, the first {lost[0]}: unpack it anew."
        )
    for number, title in enumerate(HUB_SPLITS):
        rows = np.flatnonzero(split == number)
        paths = [images / names[row] for row in rows]
        label, attribute = (values[rows] == 1 for values in ids)
        yield labelled(paths, label, attribute, LABEL, ATTRIBUTE, f"{title} of {partition}")


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}. {WAYS}")


def _read_table(path: Path, columns: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Names of the images, and some columns of ints: of a CSV file, or of one with blanks between the values."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file)) if path.suffix == ".csv" else [line.split() for line in file]
    rows = [row for row in rows if row]
    if path.suffix == ".csv":
        header, rows = rows[0][1:], rows[1:]
    elif len(rows[0]) == 1:  # the number of images, then the attributes
        header, rows = rows[1], rows[2:]
    else:
        header = ["partition"]
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path} has no columns {missing}, only {', '.join(header[:45])}.")
    places = [header.index(name) + 1 for name in columns]
    try:
        return [row[0] for row in rows], [np.array([int(row[place]) for row in rows]) for place in places]
    except (ValueError, IndexError) as failure:
        raise ValueError(f"{path} has a row that is cut off or holds no number ({failure}).") from failure
