# SPDX-License-Identifier: Apache-2.0
"""Makes pairs by exchange: an image, and the same image with one of its parts taken from an image of another label.

A part is a region of the frame, the background, or a property of the whole image, such as its colours. `ipg scan`
exchanges the same parts to find out which of them a model follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from .edits import ImagePool, alpha_of, edited
from .images import image_content
from .makers import check_choice, check_is_set, check_number, draw_rows, known_values

BACKGROUND, CENTER, OVERLAY = "background", "center", "overlay"
LEAST_SIZE = 8  # pixels: a border of a smaller image has none

# region -> its upper, lower, left and right edge, as shares of the frame
BOXES = {
    "border": (0.075, 0.925, 0.075, 0.925),
    "top": (0, 0.15, 0, 1),
    "bottom": (0.85, 1, 0, 1),
    "left": (0, 1, 0, 0.15),
    "right": (0, 1, 0.85, 1),
    "top_left": (0, 0.3, 0, 0.3),
    "top_right": (0, 0.3, 0.7, 1),
    "bottom_left": (0.7, 1, 0, 0.3),
    "bottom_right": (0.7, 1, 0.7, 1),
}
# the same of the box around a central oval
OVALS = {"surroundings": (0.14, 0.86, 0.06, 0.94), CENTER: (0.14, 0.86, 0.06, 0.94)}
OUTSIDE = ("border", "surroundings")  # regions outside of their box or oval
SOFT = 0.02  # radius of the blur of a region's edge, as a share of the frame's shorter side
DETAIL = 0.02  # radius of the blur that takes the fine detail off, as a share of the frame's shorter side
PATCHES = 4  # rows and columns of patches, an even number
RIGHT_ANGLE = 0.1  # cosine: axes of about a right angle
MOST = 4.0  # times that a spread of colours is enlarged: what is nearly grey is noise
# an overlay is looked for in images of GRID × GRID pixels
GRID = 128
ALIKE = 24  # of 255: the largest difference of a channel at which two pixels are alike
MORE = 0.7  # by which the share of images that are alike is higher than in the images of other answers
MORE_OF_A_LABEL = 0.4  # the same for labels: a model may follow an overlay more than its training labels do
LEAST_PIXELS = 16
GROWN = 5  # pixels, odd: the edge of a mark is blended with what is around it
KINDS, OF_A_KIND, LEAST_OF_A_KIND = 20, 50, 10  # labels that are looked at, and images of each

Exchange = Callable[[Image.Image, Image.Image], Image.Image]


def exchange_pairs(
    source: datasets.Dataset,
    *,
    part: str,
    mask: str = "mask",
    soft_edge: float = 1.5,
    num_pairs: int | None = None,
    seed: int = 0,
    skip_unchanged: bool = False,
) -> datasets.Dataset:
    """Makes pairs of an image and the same image with a part of another one (ours).

    It needs no attribute. The other image, the donor, is drawn from those with another label, so that the pairs guard
    against a part that tells the label. Use it for what `ipg scan` finds. A part that overlaps the object changes
    the object with it: look at a preview.

    Args:
        source: a set with the columns `image` and, optionally, `label`. Without labels the donor is any other image.
        part: what is exchanged:
            - `"surroundings"`: all outside of a central oval of 0.72 of the height and 0.88 of the width.
            - `"background"`: all outside of the object, by its mask. The donor's object is filled from around it.
            - `"border"`: a frame, 0.075 of height and width on each side.
            - `"top"`, `"bottom"`, `"left"`, `"right"`: a strip along an edge, 0.15 of height or width.
            - `"top_left"`, `"top_right"`, `"bottom_left"`, `"bottom_right"`: a corner, 0.3 of height and width.
            - `"overlay"`: what looks the same in most images of one label and in few others, outside of the central
              oval: a stamp, a logo, a ruler, a frame ([`overlay_region`]). It needs 10 images of the label and 10
              others. The 20 most frequent labels are looked at, by at most 50 images of each.
            - `"color"`: the mean colour, and the spread along the principal axes of the colours, at most 4 times the
              image's own.
            - `"texture"`: the fine detail. That of the donor's corners is put everywhere. Compression, blur and noise
              show in it.
        mask: column of masks, for `"background"`, as [`background_pairs`] takes them.
        soft_edge: radius in pixels of the Gaussian blur of the mask's edge; 0 or more.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all.
        seed: non-negative seed of the draws of rows and donors.
        skip_unchanged: `True` leaves out the images that the exchange does not change. A warning counts them. By
            default such an image is an error.

    Returns:
        A set with the columns `image_a` (the image), `image_b` (with the donor's part), `attribute_a`, `attribute_b`
        (`"own"`, `"exchanged"`), `source_id` (number of the row in the source) and, if the source has it, `label`.

    Raises:
        ValueError: `part` is unknown; the source is a stream or lacks a column; it has one image, or one label; an
            image or a mask cannot be read; an image does not change, or is smaller than 8 pixels; a mask is empty,
            covers the whole image or is no mask; there is no overlay, or no label to find it by.
    """
    check_choice("part", part, [*(name for name in PARTS if name != CENTER), BACKGROUND, OVERLAY])
    check_is_set(source, "the source")
    check_number("soft_edge", soft_edge, 0, math.inf)
    is_masked = part == BACKGROUND
    donors = Donors(source, mask if is_masked else None)
    if part == OVERLAY:
        draw_rows(len(source), num_pairs, seed=seed, of="source rows")  # refuses these two before the images are read
        found = donors.overlay()
        exchange = partial(put_region, found=found)
    elif not is_masked:
        exchange = PARTS[part]

    def edit(image: Image.Image, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        check_size(image)
        donor = fitted(donors.draw(rng, row), image.size, part)
        if is_masked:
            return image, Image.composite(image, donor, alpha_of(row[mask], image.size, soft_edge))
        return image, exchange(image, donor)

    return edited(
        source,
        edit,
        datasets.ClassLabel(names=["own", "exchanged"]),
        masks=[mask] if is_masked else [],
        needs=["label"] if "label" in source.column_names else [],
        num_pairs=num_pairs,
        seed=seed,
        skip_unchanged=skip_unchanged,
        facts=[
            "exchange",
            part,
            soft_edge,
            [donors.pool.stored],
            None if donors.labels is None else donors.labels.tolist(),
        ],
    )


class Donors:
    """The images that parts are taken from.

    Args:
        source: a set with the column `image` and, optionally, `label`.
        mask: column of masks of objects, which are filled from around them. By default the images are left as they are.

    Raises:
        ValueError: a column is missing; there are fewer than two images, or labels.
    """

    def __init__(self, source: datasets.Dataset, mask: str | None = None):
        self.pool = ImagePool(source, None, "the source", mask)
        self.labels = known_values(source, "label") if "label" in source.column_names else None
        rows = np.arange(len(source))
        kinds = rows if self.labels is None else np.unique(self.labels)
        if len(kinds) < 2:
            what = "images" if self.labels is None else "labels"
            raise ValueError(f"an exchange needs two {what}, but the source has {len(kinds)}: add other images.")
        # label -> rows of the other labels
        self.rows = {None: rows}
        if self.labels is not None:
            self.rows = {kind: rows[self.labels != kind] for kind in kinds.tolist()}

    def draw(self, rng: np.random.Generator, row: Mapping[str, Any]) -> Image.Image:
        """Draws a donor for an image, in RGB.

        Args:
            rng: the generator.
            row: the row of the image, as the set has it, with `image` encoded. The donor is no copy of it.

        Raises:
            ValueError: there is none.
        """
        rows = self.rows[row.get("label") if self.labels is not None else None]
        own, start = image_content(row["image"]), int(rng.integers(len(rows)))
        for number in (int(rows[(start + step) % len(rows)]) for step in range(len(rows))):
            if image_content(self.pool.stored[number]["image"]) != own:
                return self.pool.read(number)
        raise ValueError("no other image has a part to give: all images of another label are copies of this one.")

    def overlay(self) -> Image.Image:
        """The region of an overlay that goes with a label, of [`overlay_region`].

        Raises:
            ValueError: there is none, or there are no labels.
        """
        if self.labels is None:
            raise ValueError("part='overlay' needs the column 'label': an overlay is what the images of a label share.")
        rows = rows_to_compare(self.labels)
        found = overlay_region((self.pool.read(row) for row in rows.tolist()), self.labels[rows], MORE_OF_A_LABEL)
        if found is None:
            counts = np.unique(self.labels[rows], return_counts=True)[1]
            looked_at = int(((counts >= LEAST_OF_A_KIND) & (len(rows) - counts >= LEAST_OF_A_KIND)).sum())
            raise ValueError(
                "there is no overlay: outside of the middle, nothing looks the same in most images of one label and in "
                f"few others. Of {len(self.rows)} labels {looked_at} were looked at, of the {KINDS} most frequent "
                f"those with {LEAST_OF_A_KIND} images beside {LEAST_OF_A_KIND} others. Exchange another part."
            )
        return found


def fitted(donor: Image.Image, size: tuple[int, int], part: str | None = None) -> Image.Image:
    """Scales a donor to the width and height of the image that gets its part.

    A part at a place of the frame comes from the same place of the donor's frame, whose aspect ratio is not kept. For
    other parts the donor is cropped at its centre.
    """
    if donor.size == size:
        return donor
    if part in BOXES or part == OVERLAY:
        return donor.resize(size, Image.Resampling.BICUBIC)
    return ImageOps.fit(donor, size, Image.Resampling.BICUBIC)


def check_size(image: Image.Image) -> None:
    """Raises a ValueError if an image is too small to have parts."""
    if min(image.size) < LEAST_SIZE:
        raise ValueError(
            f"an image of {image.width}×{image.height} pixels has no parts: leave out images below {LEAST_SIZE} pixels."
        )


@lru_cache(maxsize=256)
def region(name: str, size: tuple[int, int]) -> Image.Image:
    """The mask of a region of the frame, 255 inside, with a soft edge.

    Args:
        name: a key of `BOXES` or `OVALS`.
        size: width and height of the mask in pixels.
    """
    columns, rows = ((np.arange(length) + 0.5) / length for length in size)
    up, down, left, right = BOXES.get(name) or OVALS[name]
    # distance from the middle, 1 at the edge
    y, x = (np.abs(2 * at - low - high) / (high - low) for at, low, high in ((rows, up, down), (columns, left, right)))
    inside = np.hypot(y[:, None], x) <= 1 if name in OVALS else np.maximum(y[:, None], x) <= 1
    mask = Image.fromarray(np.uint8(255 * (inside != (name in OUTSIDE))))
    return mask.filter(ImageFilter.GaussianBlur(SOFT * min(size)))


def rows_to_compare(kinds: np.ndarray) -> np.ndarray:
    """Rows by which an overlay is looked for: of the 20 most frequent kinds, 50 of each, drawn with a fixed seed."""
    rng = np.random.default_rng(OF_A_KIND)
    names, counts = np.unique(kinds, return_counts=True)
    most = names[np.argsort(-counts, kind="stable")[:KINDS]]
    chosen = [np.flatnonzero(kinds == kind) for kind in most]
    return np.sort(np.concatenate([rng.permutation(of)[:OF_A_KIND] for of in chosen]))


def overlay_region(images: Iterable[Image.Image], kinds: np.ndarray, more: float = MORE) -> Image.Image | None:
    """Finds what looks the same in most images of one kind and in few others, outside of the central oval (ours).

    A pixel belongs to it if the share of images that are like the median image of a kind is higher by `more` in this
    kind than in the other images. In the middle the object would be found.

    Args:
        images: RGB images. They are compared at 128 × 128 pixels, whatever their aspect ratios.
        kinds: labels or answers, shape (n,). A kind of fewer than 10 images is not looked at, nor one beside fewer than
            10 others.
        more: in (0, 1].

    Returns:
        A mask of 128 × 128 pixels, 255 inside, or `None` if there is no such region.
    """
    shape = (GRID, GRID)
    pixels = np.stack([np.asarray(image.resize(shape, Image.Resampling.BILINEAR), np.int16) for image in images])
    inside = np.zeros(shape, bool)
    for kind in np.unique(kinds):
        own = kinds == kind
        if own.sum() < LEAST_OF_A_KIND or (~own).sum() < LEAST_OF_A_KIND:
            continue
        twice = np.rint(2 * np.median(pixels[own], 0)).astype(np.int16)  # a median may be half of an odd number
        is_alike = np.stack([(np.abs(2 * image - twice) <= 2 * ALIKE).all(-1) for image in pixels])
        inside |= is_alike[own].mean(0) - is_alike[~own].mean(0) >= more
    inside &= np.asarray(region("surroundings", shape)) > 127
    if inside.sum() < LEAST_PIXELS:
        return None
    return Image.fromarray(np.uint8(255 * inside)).filter(ImageFilter.MaxFilter(GROWN))


def put_region(image: Image.Image, donor: Image.Image, found: Image.Image) -> Image.Image:
    """An image with a donor's pixels in a region of [`overlay_region`]; both RGB and of one size."""
    mask = found.resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(donor, image, mask.filter(ImageFilter.GaussianBlur(SOFT / 2 * min(image.size))))


def _region(image: Image.Image, donor: Image.Image, name: str) -> Image.Image:
    return Image.composite(donor, image, region(name, image.size))


def _color(image: Image.Image, donor: Image.Image) -> Image.Image:
    """Gives an image the donor's colours: the mean, and the spread along each principal axis of the colours."""
    pixels, others = (np.asarray(part, np.float64).reshape(-1, 3) for part in (image, donor))
    mean, spread, axes = _axes(pixels)
    mean_of_donor, spread_of_donor, axes_of_donor = _axes(others)
    # an axis has no direction of its own: it gets that of the image's axis or, at a right angle to it, that of an
    # increase of its largest channel
    largest = [axes[np.abs(axes).argmax(0), range(3)] for axes in (axes, axes_of_donor)]
    along = (axes * axes_of_donor).sum(0)
    turn = np.where(np.abs(along) > RIGHT_ANGLE, np.sign(along), np.sign(largest[0]) * np.sign(largest[1]))
    scale = np.where(spread > 1, np.minimum(spread_of_donor / np.maximum(spread, 1), MOST), 0)
    made = (pixels - mean) @ axes * (scale * turn) @ axes_of_donor.T + mean_of_donor
    return Image.fromarray(np.uint8(np.rint(made.clip(0, 255))).reshape(*image.size[::-1], 3))


def _axes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation along each principal axis (largest first), and the axes as columns, of RGB pixels."""
    mean = pixels.mean(0)
    variances, axes = np.linalg.eigh(np.cov((pixels - mean).T))
    return mean, np.sqrt(variances[::-1].clip(0)), axes[:, ::-1]


def _texture(image: Image.Image, donor: Image.Image) -> Image.Image:
    """Gives an image the fine detail of the donor's corners, which show little of the donor's object."""
    radius = DETAIL * min(image.size)
    width, height = image.size
    grid = -(-height // PATCHES), -(-width // PATCHES)  # height and width of a patch
    donor = fitted(donor, (PATCHES * grid[1], PATCHES * grid[0]))
    own, other = (np.asarray(part.filter(ImageFilter.GaussianBlur(radius)), np.float64) for part in (image, donor))
    detail = (np.asarray(donor, np.float64) - other).reshape(PATCHES, grid[0], PATCHES, grid[1], 3)
    # the patches of a quarter of the frame all get that of the opposite corner
    corner = np.where(np.arange(PATCHES) < PATCHES // 2, PATCHES - 1, 0)
    detail = detail[corner][:, :, corner].reshape(*other.shape)[:height, :width]
    return Image.fromarray(np.uint8(np.rint((own + detail).clip(0, 255))))


# part -> the exchange of an image with a donor of the same size, both RGB
PARTS: dict[str, Exchange] = {
    "color": _color,
    "texture": _texture,
    **{name: partial(_region, name=name) for name in (*BOXES, *OVALS)},
}
