# SPDX-License-Identifier: Apache-2.0
"""Waterbirds: birds of CUB-200-2011 put on land and on water backgrounds of Places.

Source: Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", arXiv 1911.08731, and its code
(kohpangwei/group_DRO, `dataset_scripts/generate_waterbirds.py`).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import datasets
import numpy as np

from ..pairs.edits import background_pairs
from ..pairs.makers import check_choice, dataset_of, image_column
from ..pairs.sources import pairs_from_columns
from .benchmark import Benchmark
from .locate import as_files, check_values, find_folder, labelled, load_hub_set

LABEL = datasets.ClassLabel(names=["landbird", "waterbird"])
PLACE = datasets.ClassLabel(names=["land", "water"])
SPLITS = ("train", "validation", "test")  # 0, 1, 2 of metadata.csv
CORRELATIONS = ("95", "100")
NUM_PAIRS = 300  # as in the IPG paper
NUM_HELD_OUT_PAIRS = 600

HUB_SET = "grodino/waterbirds"
FOLDERS = ("waterbirds", "waterbirds_v1.0", "waterbird_complete95_forest2water2")
TABLE = "metadata.csv"
COLUMNS = ("img_filename", "y", "split", "place", "place_filename")
SCENES = (("bamboo_forest", "forest/broadleaf"), ("ocean", "lake/natural"))  # Places' categories, land and water
SUFFIXES = (".jpg", ".jpeg", ".png")
SHARES = (0.6, 0.2, 0.2)  # shares of the backgrounds for the pairs of training, validation and test

WAYS = (
    f"Give the folder of Waterbirds with its {TABLE} (WILDS' waterbirds_v1.0 or group DRO's "
    f"waterbird_complete95_forest2water2) as data_dir. Or connect to the internet and give no data_dir: the Hub set "
    f"{HUB_SET} is loaded. A benchmark that needs no download: recipes/digits/ipg_resnet.yaml."
)


def load_waterbirds(
    *,
    data_dir: str | None = None,
    seed: int = 0,
    num_pairs: int | None = None,
    oriented_pairs: bool = True,
    correlation: Literal["95", "100"] = "95",
    segmentations_dir: str | None = None,
    places_dir: str | None = None,
) -> Benchmark:
    """Loads Waterbirds. For non-commercial research and education only, because of the photographs.

    - Image: RGB, of many sizes, as in CUB. Label: 0 "landbird", 1 "waterbird". Attribute: 0 "land", 1 "water", the
      place behind the bird. Group: 2·label + attribute, as in the code of group DRO.
    - Training: 4,795 images, groups 3,498, 184, 56 and 1,057. The place agrees with the bird in 95 % of them. With
      `correlation="100"` the 240 rows of the two minority groups are left out, as for the base models without minority
      groups in the code of DFR (arXiv 2204.02937). The Waterbirds-100 of GALS (Petryk et al., CVPR 2022) has other
      images: to use it, give its folder.
    - Validation: 1,199 images (467, 466, 133, 133). Test: 5,794 images (2,255, 2,255, 642, 642). In both, half of the
      birds of each label are on land, half on water. The split is the authors'. Validation chooses settings and
      checkpoints; test does not.
    - Pairs: none, unless `segmentations_dir` and `places_dir` are given. (A maker, for example `match`, can make
      others.) The bird of a training image is cut out by CUB's mask and put on a land background (side a) and on a
      water background (side b), at its own position. For the flip rate, the same is done with 600 drawn birds of
      validation and of test. `source_id` is the number of the row in its split. Training, validation and test draw
      their backgrounds from parts of the pool that do not overlap, and no background is that of a validation or test
      image. This is our reading: the IPG paper only says that it uses 300 pairs.

    The folder is `data_dir`, or a folder `waterbirds`, `waterbirds_v1.0` or `waterbird_complete95_forest2water2` in it.
    Without `data_dir` it is one of these folders in the folder that the environment variable IPG_DATA names. It has
    `metadata.csv` with the columns img_filename, y, split (0 training, 1 validation, 2 test), place and
    place_filename. If there is no `data_dir` and no folder, the Hub set `grodino/waterbirds` is loaded (columns image,
    label, place). It has the same images without the names of the files, so no pairs can be composed from it.

    Args:
        data_dir: the folder.
        seed: non-negative seed of the pairs and their backgrounds.
        num_pairs: number of training pairs, 1 to the number of training images. `None` is 300.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.
        correlation: percentage of the training images whose place agrees with the bird.
        segmentations_dir: folder of CUB's masks: `segmentations_dir/001.Black_footed_Albatross/….png`.
        places_dir: folder of Places365 (or its sub-folder `data_large`) with the categories that Waterbirds uses:
            b/bamboo_forest, f/forest/broadleaf, o/ocean and l/lake/natural. Or a folder with your own photographs in
            the sub-folders `land` and `water`.

    Raises:
        FileNotFoundError: the images, a mask or the backgrounds are missing.
        ValueError: an option is unknown; only one of `segmentations_dir` and `places_dir` is given, or they are given
            for the Hub set; the table lacks a column or has a wrong value; a place has too few backgrounds.
    """
    correlation = str(correlation)
    check_choice("correlation", correlation, CORRELATIONS)
    if (segmentations_dir is None) != (places_dir is None):
        raise ValueError(
            f"segmentations_dir={segmentations_dir!r} and places_dir={places_dir!r}: pairs by mask need both of them. "
            "Give both or none."
        )
    folder = find_folder(data_dir, FOLDERS, [TABLE], WAYS)
    if folder is None and places_dir is not None:
        raise ValueError(f"pairs by mask need the names of the images, which the Hub set does not have. {WAYS}")
    tables = _read_table(folder) if folder else {}
    hub = None if folder else load_hub_set(HUB_SET, ("image", "label", "place"), SPLITS, WAYS)
    sets = {}
    for split in SPLITS:
        if hub:
            ids = (np.asarray(hub[split][name][:]) for name in ("label", "place"))
            sets[split] = labelled(hub[split], *ids, LABEL, PLACE, f"{split} of {HUB_SET}")
        else:
            names, *ids = (tables[split][name] for name in ("img_filename", "y", "place"))
            sets[split] = labelled(_existing(folder, names), *ids, LABEL, PLACE, f"{split} of {folder / TABLE}")
    aligned = np.arange(len(sets["train"]))
    if correlation == "100":
        aligned = np.flatnonzero(np.equal(sets["train"]["label"][:], sets["train"]["attribute"][:]))
        sets["train"] = sets["train"].select(aligned)
    pairs = dict.fromkeys(SPLITS)
    if places_dir is not None:
        tables["train"] = {name: values[aligned] for name, values in tables["train"].items()}
        count = min(NUM_PAIRS, len(aligned)) if num_pairs is None else num_pairs
        pairs = _composed(sets, tables, Path(segmentations_dir), Path(places_dir), count, seed)
        pairs["train"] = pairs_from_columns(pairs["train"], "image_a", "image_b", oriented=oriented_pairs, seed=seed)
    return Benchmark(
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        pairs=pairs["train"],
        validation_pairs=pairs["validation"],
        test_pairs=pairs["test"],
    )


def _read_table(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads the table: split -> column name -> values, strings or ints."""
    path = folder / TABLE
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path} has no rows, or no columns {missing}: it must have {', '.join(COLUMNS)}.")
    columns = {name: np.array([row[name] for row in rows]) for name in COLUMNS}
    for name in ("y", "split", "place"):
        try:
            columns[name] = columns[name].astype(np.int64)
        except ValueError as failure:
            raise ValueError(f"{name} of {path} is not a number in every row ({failure}).") from failure
    check_values(f"split of {path}", columns["split"], (0, 1, 2))
    return {
        split: {name: values[columns["split"] == number] for name, values in columns.items()}
        for number, split in enumerate(SPLITS)
    }


def _existing(folder: Path, names: Sequence[str]) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the folder is not complete, unpack it again.")
    return paths


def _composed(
    sets: dict[str, datasets.Dataset],
    tables: dict[str, dict[str, np.ndarray]],
    segmentations: Path,
    places: Path,
    num_pairs: int,
    seed: int,
) -> dict[str, datasets.Dataset]:
    """Makes the pairs of each split: the bird of an image on two backgrounds."""
    taken = {name.lstrip("/") for split in SPLITS[1:] for name in tables[split]["place_filename"]}
    pools = [_backgrounds(places, kind, taken, seed) for kind in range(2)]
    made = {}
    for number, split in enumerate(SPLITS):
        masks = _existing(
            segmentations, [str(Path(name).with_suffix(".png")) for name in tables[split]["img_filename"]]
        )
        masks = dataset_of({"mask": (image_column(as_files(masks)), datasets.Image())})
        backgrounds = tuple(
            dataset_of({"image": (image_column(as_files(pool[number])), datasets.Image())}) for pool in pools
        )
        made[split] = background_pairs(
            datasets.concatenate_datasets([sets[split], masks], axis=1),
            backgrounds=backgrounds,
            soft_edge=0.0,  # as Waterbirds was composed: the edges of CUB's masks are soft already
            num_pairs=num_pairs if split == "train" else min(NUM_HELD_OUT_PAIRS, len(masks)),
            seed=seed,
        )
    return made


def _backgrounds(places: Path, kind: int, taken: set[str], seed: int) -> list[list[Path]]:
    """Lists photographs for the pairs of each split.

    Args:
        places: folder of Places365, or with sub-folders `land` and `water`.
        kind: 0 land, 1 water.
        taken: paths of the photographs in validation and test images. They are left out.
        seed: non-negative seed of the division among the splits.
    """
    name = PLACE.names[kind]
    layouts = [(places, [name])]
    layouts += [(root, [f"{part[0]}/{part}" for part in SCENES[kind]]) for root in (places, places / "data_large")]
    for root, folders in layouts:
        if all((root / part).is_dir() for part in folders):
            break
    else:
        raise FileNotFoundError(
            f"places_dir={str(places)!r} has neither a folder {name} nor Places365's {' and '.join(folders)}."
        )
    found = sorted(path for part in folders for path in (root / part).rglob("*") if path.suffix.lower() in SUFFIXES)
    free = [path for path in found if path.relative_to(root).as_posix() not in taken]
    order = np.random.default_rng((seed, 8, kind)).permutation(len(free))
    parts = np.split(order, np.round(np.cumsum(SHARES)[:-1] * len(free)).astype(int))
    if not all(map(len, parts)):
        raise ValueError(
            f"{root} has {len(free)} photographs of {name} that validation and test images do not use: too few for the "
            "pairs of three splits, which need 5 at least. Add photographs."
        )
    return [[free[row] for row in part] for part in parts]
