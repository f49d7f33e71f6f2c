# SPDX-License-Identifier: Apache-2.0
"""CelebA: the label is whether a person has blond hair, the spurious attribute whether the person is labelled male.

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
from .locate import check_values, find_folder, labelled, load_hub_set

LABEL = datasets.ClassLabel(names=["not_blond", "blond"])
ATTRIBUTE = datasets.ClassLabel(names=["female", "male"])
COLUMNS = ("Blond_Hair", "Male")

HUB_SET = "flwrlabs/celeba"
HUB_SPLITS = ("train", "valid", "test")  # 0, 1, 2 of the partition
FOLDERS = ("celeba", "celebA", "celebA_v1.0", "celebA/data")
# the layout of Kaggle and WILDS, the layout that torchvision unpacks, and the layout of the authors' page
ATTRIBUTES = ("list_attr_celeba.csv", "list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
PARTITION = ("list_eval_partition.csv", "list_eval_partition.txt", "Eval/list_eval_partition.txt")
IMAGES = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")

WAYS = (
    "Give the folder of CelebA (img_align_celeba, list_attr_celeba and list_eval_partition as .csv or .txt) as "
    f"data_dir. Or connect to the internet and give no data_dir: the Hub set {HUB_SET} (about 12 GB) is loaded. A "
    "benchmark that needs no download: recipes/digits/ipg_resnet.yaml."
)


def load_celeba(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """Loads CelebA with the label Blond_Hair and the attribute Male. For non-commercial research only.

    - Image: RGB, 178×218 pixels, aligned faces. Label: 0 "not_blond", 1 "blond". Attribute: 0 "female", 1 "male".
      Group: 2·label + attribute, as in the code of group DRO.
    - Split of the authors: 162,770 images for training, of which 1,387 are blond men (arXiv 1911.08731); 19,867 for
      validation, which chooses settings and checkpoints; 19,962 for test. The groups have about the same shares in all
      three.
    - Pairs: none, in training and in evaluation. No two photographs differ in the attribute alone. A maker can make
      training pairs: `pairs: {maker: match, match_on: features, max_per_group: 5000}` pairs two persons with the same
      label. Set `max_per_group`: matching 70,000 with 67,000 images needs more memory than a machine has.

    The folder is `data_dir`, or a folder `celeba`, `celebA`, `celebA_v1.0` or `celebA/data` in it. Without `data_dir`
    it is one of these folders in the folder that the environment variable IPG_DATA names. It has:

    - `img_align_celeba/`: the images.
    - `list_attr_celeba.csv` or `.txt`: attributes with the values -1 and 1.
    - `list_eval_partition.csv` or `.txt`: 0 training, 1 validation, 2 test.

    They may also be in sub-folders Img, Anno and Eval, as on the authors' page. If there is no `data_dir` and no
    folder, the Hub set `flwrlabs/celeba` is loaded (columns `image` and 40 attributes, true or false; splits train,
    valid and test).

    Args:
        data_dir: the folder.
        seed: not used, because nothing is drawn.
        num_pairs: not used, because there are no pairs. It is an option of a maker.
        oriented_pairs: not used, because there are no pairs.

    Raises:
        FileNotFoundError: the files are missing, or an image that they name.
        ValueError: a table lacks an attribute or has a wrong value; the two tables name different images.
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
        raise ValueError(
            f"{attributes} and {partition} do not name the same images in the same order: unpack both of them again."
        )
    for column, values in zip(COLUMNS, ids, strict=True):
        check_values(f"{column} of {attributes}", values, (-1, 1))
    check_values(str(partition), split, (0, 1, 2))
    present = {*os.listdir(images)}
    lost = [name for name in names if name not in present]
    if lost:
        raise FileNotFoundError(
            f"{images} lacks {len(lost)} of {len(names)} images, the first {lost[0]}: unpack it again."
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
    """Reads the names of the images and columns of ints, from a .csv file or a .txt file with blanks between values."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file)) if path.suffix == ".csv" else [line.split() for line in file]
    rows = [row for row in rows if row]
    if path.suffix == ".csv":
        header, rows = rows[0][1:], rows[1:]
    elif len(rows[0]) == 1:  # the first line is the number of images, the second the names of the attributes
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
        raise ValueError(
            f"{path} has a row that is cut off or has no number ({failure}): unpack it again."
        ) from failure
