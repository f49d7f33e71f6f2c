# SPDX-License-Identifier: Apache-2.0
"""Scenes, an analogue of Waterbirds made of photographs, whose images are not for redistribution."""

from __future__ import annotations

from typing import Literal

from .benchmark import Benchmark
from .files import load_files
from .locate import find_folder

CORRELATIONS = ("95", "100")


def load_scenes(
    *,
    data_dir: str | None = None,
    seed: int = 0,
    num_pairs: int | None = None,
    oriented_pairs: bool = True,
    correlation: Literal["95", "100"] = "95",
) -> Benchmark:
    """Reads a folder of scenes (ours): birds of CUB-200-2011 cut out and put on Intel's images of scenes.

    - Image: RGB, 224×224 pixels. Label: 0 "landbird", 1 "waterbird". Attribute: 0 "land", 1 "water", the place behind
      the bird. Group: 2·label + attribute.
    - Training: 1,630 images, groups 1,092, 58, 24 and 456; with `correlation="100"` the 82 rows of the two minority
      groups (column `aligned` false) are left out.
    - Validation: 480 images, test: 880, both balanced by group; each of their birds stands on both places, which gives
      the held-out pairs, 240 and 440. No bird and no background is in two splits.
    - Pairs: 960, the bird of a training image on land (side a) and on water (side b); their backgrounds are a pool of
      their own.

    The images are not for redistribution (CUB-200-2011 is for research and education only), so that nobody can fetch
    them; the loader reads any folder of the same form: see [`load_files`], columns image, label, place, fg_id (the
    bird) and aligned. It is looked for in `data_dir` or in a folder `scenes` in it, or else in a folder `scenes` where
    the environment variable IPG_DATA points.

    Args:
        data_dir: the folder.
        seed: non-negative; seed of the pairs that are drawn.
        num_pairs: number of training pairs, 1 to 960; `None` is all.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.
        correlation: percentage of the training images whose place goes with the bird.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: `correlation` is unknown; as in [`load_files`].
    """
    correlation = str(correlation)
    if correlation not in CORRELATIONS:
        raise ValueError(f"correlation={correlation!r} is unknown: choose from {', '.join(CORRELATIONS)}.")
    ways = (
        "The images of scenes are not for redistribution, so that there is nothing to fetch. Make a folder of the same "
        "form (see ipg_hf.data.load_files), or take Waterbirds, its public model: recipes/waterbirds/erm_resnet50.yaml."
    )
    folder = find_folder(data_dir, ["scenes"], ["train*", "data/train*.parquet"], ways)
    if folder is None:
        raise FileNotFoundError(f"no data_dir is given, and the folder of IPG_DATA holds no scenes. {ways}")
    return load_files(
        data_dir=str(folder),
        seed=seed,
        num_pairs=num_pairs,
        oriented_pairs=oriented_pairs,
        attribute="place",
        instance="fg_id",
        keep={"aligned": True} if correlation == "100" else None,
    )
