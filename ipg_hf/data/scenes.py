# SPDX-License-Identifier: Apache-2.0
"""Scenes: photographs composed like Waterbirds. The images may not be redistributed."""

from __future__ import annotations

from typing import Literal

from ..pairs.makers import check_choice
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
    """Loads a folder of scenes (ours): birds of CUB-200-2011, cut out and put on Intel's images of scenes.

    - Image: RGB, 224×224 pixels. Label: 0 "landbird", 1 "waterbird". Attribute: 0 "land", 1 "water", the place behind
      the bird. Group: 2·label + attribute.
    - Training: 1,630 images, groups 1,092, 58, 24 and 456. With `correlation="100"` the 82 rows of the two minority
      groups (column `aligned` false) are left out.
    - Validation: 480 images. Test: 880 images. Both are balanced by group. Each of their birds is on both places, which
      gives 240 and 440 pairs for the flip rate. No bird and no background is in two splits.
    - Pairs: 960, the bird of a training image on land (side a) and on water (side b). Their backgrounds are in no other
      image.

    The images may not be redistributed (CUB-200-2011 is for research and education only), so there is no download. The
    loader reads any folder that [`load_files`] accepts with the columns `image`, `label`, `place`, `fg_id` (the bird)
    and `aligned`. The folder is `data_dir`, or a folder `scenes` in it. Without `data_dir` it is a folder `scenes` in
    the folder that the environment variable IPG_DATA names.

    Args:
        data_dir: the folder.
        seed: non-negative seed of the draw of the pairs.
        num_pairs: number of training pairs, 1 to 960. `None` uses all.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.
        correlation: percentage of the training images whose place agrees with the bird.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: `correlation` is unknown; [`load_files`] refuses the folder.
    """
    correlation = str(correlation)
    check_choice("correlation", correlation, CORRELATIONS)
    ways = (
        "The images of scenes are not for redistribution, so there is no download. Make a folder of the same form (see "
        "ipg_hf.data.load_files), or use Waterbirds, the public benchmark that it follows: "
        "recipes/waterbirds/erm_resnet50.yaml."
    )
    folder = find_folder(data_dir, ["scenes"], ["train*", "data/train*.parquet"], ways)
    if folder is None:
        raise FileNotFoundError(f"data_dir is not given, and the folder of IPG_DATA has no folder scenes. {ways}")
    return load_files(
        data_dir=str(folder),
        seed=seed,
        num_pairs=num_pairs,
        oriented_pairs=oriented_pairs,
        attribute="place",
        instance="fg_id",
        keep={"aligned": True} if correlation == "100" else None,
    )
