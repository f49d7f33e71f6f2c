# SPDX-License-Identifier: Apache-2.0
"""Makes pairs by editing images: other colours, an overlay, or another background.

The draws of a row depend on the seed and the row's number alone. A stream gives a stream of pairs. The pairs of a
map-style set are kept in the cache folder of `datasets`, under a hash of the images, the settings and the code.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from .classes import is_class_label, is_text, sorted_names
from .images import check_depth, file_of, read_image, read_rgb, stored_images
from .makers import check_choice, check_columns, check_is_set, check_number, draw_rows, encode_image, map_cached

logger = logging.getLogger(__name__)

Recoloring = Literal["hue", "channels", "gray"]
Overlay = Literal["mark", "frame", "text", "watermark", "ruler"]
Edit = Callable[[Image.Image, Mapping[str, Any], np.random.Generator], tuple[Image.Image, Image.Image]]

ABSENT_PRESENT = {("0", "1"), ("false", "true"), ("no", "yes"), ("without", "with"), ("absent", "present")}

UNCHANGED = -1  # `source_id` of a row that makes no pair, until it is left out
FIRST_ROWS = 256  # of a stream, in which the values of an attribute are looked for
FILL_MARGIN = 9  # pixels, odd: masks are not exact at their edges, and the fill would copy rests of the foreground
FILL_BLUR = 6.0  # pixels
CANDIDATES = 16  # backgrounds drawn for a side: the new foreground hides the filled part of the chosen one best
COARSE = 32  # height and width in pixels of the masks that are compared to choose it


def recolor_pairs(
    source: Any,
    *,
    change: Recoloring = "hue",
    amount: float | None = None,
    order: str = "grb",
    attribute: str | None = None,
    num_pairs: int | None = None,
    seed: int = 0,
    skip_unchanged: bool = False,
) -> Any:
    """Makes pairs of an image and the same image in other colours.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` with the column `image`. The column `label` is optional.
        change: `"hue"` turns the hue; `"channels"` exchanges colour channels; `"gray"` removes the colour.
        amount: degrees by which the hue turns. `None` draws 60 to 300 degrees for each image.
        order: for `"channels"`: the channel from which red, green and blue are taken. `"grb"` exchanges red and green.
        attribute: column of an attribute of two values that the change turns into each other (with `"channels"`, red
            digits become green and green ones red). The image with the first value becomes side a, so the pairs are
            oriented. Texts are put in alphabetical order.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all. A stream must have `None`.
        seed: non-negative seed of all draws.
        skip_unchanged: `True` leaves out the images that do not change. A warning counts them, except in a stream. The
            set may then be empty. By default an image that does not change is an error.

    Returns:
        A set with the columns `image_a`, `image_b`, `attribute_a`, `attribute_b`, `source_id` (number of the row in the
        source) and, if the source has it, `label`. Without `attribute`, side a is the original image.

    Raises:
        ValueError: `change` or `order` is unknown; a column is missing; an image cannot be read or does not change (it
            is grey already); the attribute of a row is none of its first two values.
    """
    check_choice("change", change, get_args(Recoloring))
    if not isinstance(order, str) or len(order) != 3 or not set(order) <= set("rgb"):
        raise ValueError(f"order={order!r} must be three of the letters r, g and b, for example 'grb'.")
    if amount is not None:
        check_number("amount", amount, -math.inf, math.inf)

    source = with_features(source)
    names, ids = attribute_ids(source, attribute) if attribute else (None, {})

    def edit(image: Image.Image, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        other = _recolored(image, change, amount if amount is not None else rng.uniform(60, 300), order)
        if attribute is None:
            return image, other
        if ids.get(row[attribute]) not in (0, 1):
            raise ValueError(f"{attribute}={row[attribute]!r} is none of the two values {[*ids][:2]}: drop the row.")
        return (other, image) if ids[row[attribute]] else (image, other)

    return edited(
        source,
        edit,
        names or datasets.ClassLabel(names=["original", "recolored"]),
        needs=[attribute] if attribute else [],
        num_pairs=num_pairs,
        seed=seed,
        skip_unchanged=skip_unchanged,
        facts=["recolor", change, amount, order, attribute, ids],
    )


def overlay_pairs(
    source: Any,
    *,
    overlay: Overlay | str | os.PathLike | Image.Image | Callable[[Image.Image, np.random.Generator], Image.Image] = (
        "text"
    ),
    text: str = "SAMPLE",
    size: float = 0.2,
    opacity: float = 1.0,
    color: tuple[int, int, int] = (255, 255, 255),
    random_position: bool = False,
    attribute: str | None = None,
    present: Any = None,
    fill_present: bool = False,
    num_pairs: int | None = None,
    seed: int = 0,
    skip_unchanged: bool = False,
) -> Any:
    """Makes pairs of an image without and with an overlay.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` with the column `image`. The column `label` is optional.
        overlay: what is put over the image:
            - `"mark"`: a filled square in the upper left corner.
            - `"frame"`: a border.
            - `"text"`: the text in the lower left corner.
            - `"watermark"`: the text over the whole image, slanted.
            - `"ruler"`: a scale along the lower edge.
            - a PIL image with transparency, or the path of such an image: scaled to `size`, in the upper left corner.
            - a function of (image, generator) that returns the changed image. No hash can tell what a function does, so
              these pairs are made anew at each start. `save_to_disk` keeps them.
        text: the text of `"text"` and `"watermark"`.
        size: size of the overlay as a share of the shorter side of the image, in (0, 1]: the side of a mark, the width
            of a frame, the height of a text or a ruler, the shorter side of a picture (a long one may reach beyond the
            image, which cuts it off).
        opacity: opacity of the overlay, in (0, 1].
        color: red, green and blue of the overlay, 0 to 255.
        random_position: put a mark, a text or an image at a position that is drawn for each image.
        attribute: column that says which images have the overlay already. These images are left out.
        present: the value of `attribute` that means "has the overlay", or a list of such values: names or numbers. It
            may be left out if the column has the values 0 and 1, or a ClassLabel whose names say it, such as "no" and
            "yes". A number of a ClassLabel is the number of a class, not its name.
        fill_present: use images that have the overlay already. Side b is the image as it is. On side a the area of the
            overlay is filled from the pixels around it. If the overlay occurs with one label only, this gives pairs of
            all labels. It needs `attribute` and an overlay at a fixed position.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all. A stream must have `None`.
        seed: non-negative seed of all draws.
        skip_unchanged: `True` leaves out the images that the overlay does not change. A warning counts them, except in
            a stream. The set may be empty, also if all images have the overlay already. By default both are errors.

    Returns:
        A set with the columns `image_a` (without the overlay), `image_b` (with it), `attribute_a`, `attribute_b`,
        `source_id` (number of the row in the source) and, if the source has it, `label`.

    Raises:
        ValueError: `overlay` is unknown; `size` or `opacity` is out of range; a column is missing; it is not known
            which value of `attribute` means that an image has the overlay; an image cannot be read; the overlay does
            not change an image; `fill_present` without `attribute`, with a function or with a random position.
    """
    if isinstance(overlay, (str, os.PathLike)) and overlay not in get_args(Overlay):
        if not os.path.isfile(overlay):
            raise ValueError(
                f"overlay={str(overlay)!r} is neither {', '.join(get_args(Overlay))} nor the path of a picture: name "
                "one of them."
            )
        overlay = read_image({"bytes": None, "path": str(overlay)}, "the overlay")
    if isinstance(overlay, Image.Image):
        check_depth(overlay.mode, "the overlay")
        overlay = overlay.convert("RGBA")
    elif not isinstance(overlay, str) and not callable(overlay):
        raise ValueError(
            f"overlay is a {type(overlay).__name__}: give one of {', '.join(get_args(Overlay))}, a picture, its path, "
            "or a function."
        )
    if present is not None and attribute is None:
        raise ValueError(f"present={present!r} is a value of a column: name the column too, attribute=...")
    for name, value in (("size", size), ("opacity", opacity)):
        check_number(name, value, 0, 1, above=True)
    if not isinstance(text, str):
        raise ValueError(f"text={text!r} is a {type(text).__name__}: give a text, in quotes.")
    is_color = isinstance(color, Sequence) and len(color) == 3 and all(type(level) is int for level in color)
    if not is_color or not all(0 <= level <= 255 for level in color):
        raise ValueError(f"color={color!r} is not valid: give red, green and blue, three whole numbers from 0 to 255.")
    if fill_present and (attribute is None or callable(overlay) or random_position):
        raise ValueError("fill_present=True needs attribute=..., and an overlay (no function) at a fixed position.")

    source = with_features(source)
    has_overlay = _presence(source, attribute, present) if attribute else None

    def edit(image: Image.Image, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        if callable(overlay):
            changed = overlay(image.copy(), rng)
            if not isinstance(changed, Image.Image):
                raise ValueError(
                    f"the overlay function returned a {type(changed).__name__}: it must return the changed image."
                )
            return image, changed
        place = tuple(rng.random(2)) if random_position else None
        stamp = _stamp(overlay, image.size, text, size, tuple(color), place)
        if fill_present and has_overlay(row[attribute]):
            return _filled(image, np.asarray(stamp.getchannel("A")) > 0), image
        alpha = stamp.getchannel("A").point(lambda value: round(value * opacity))
        stamp.putalpha(alpha)
        return image, Image.alpha_composite(image.convert("RGBA"), stamp).convert("RGB")

    kind = hashlib.sha256(overlay.tobytes()).hexdigest() if isinstance(overlay, Image.Image) else overlay
    shape = overlay.size if isinstance(overlay, Image.Image) else None
    settings = ["overlay", kind, shape, text, size, opacity, tuple(color), random_position]
    return edited(
        source,
        edit,
        datasets.ClassLabel(names=["without", "with"]),
        needs=[attribute] if attribute else [],
        leave_out=None if fill_present or attribute is None else lambda row: has_overlay(row[attribute]),
        num_pairs=num_pairs,
        seed=seed,
        skip_unchanged=skip_unchanged,
        facts=None if callable(overlay) else [*settings, attribute, present, fill_present],
    )


def background_pairs(
    source: Any,
    *,
    backgrounds: tuple[Any, Any] | None = None,
    mask: str = "mask",
    attribute: str = "attribute",
    soft_edge: float = 1.5,
    keep_own: bool = False,
    num_pairs: int | None = None,
    seed: int = 0,
) -> Any:
    """Makes pairs of one foreground on two backgrounds, as in Waterbirds, from any set with masks.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` with the column `image` and a column of masks. The column
            `label` is optional.
        backgrounds: two sets of images, for side a and for side b: `datasets.Dataset`s with the column `image`, or
            sequences of PIL images. By default they are the images of the source with attribute 0 and 1, their
            foreground filled from the pixels around it (our reading; photographs without a foreground are better). In
            this case 16 backgrounds are drawn, and the one is used whose filled part the new foreground hides best.
        mask: column of masks: grey images, 0 background and 255 foreground. If a mask has two values only, 0 and
            another, the other is the foreground (0 and 1, say). They are resized to the image.
        attribute: column of an attribute of two values, the kind of background. Texts are put in alphabetical order.
            It is used if `backgrounds` is not given, and by `keep_own`.
        soft_edge: radius in pixels of the Gaussian blur of the mask's edge; 0 or more.
        keep_own: use the image itself, unchanged, as the side of its own kind of background. Only the other side is
            composed. Then the sides also differ in what composing leaves behind at the edges.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all. A stream must have `None`.
        seed: non-negative seed of all draws.

    Returns:
        A set with the columns `image_a`, `image_b`, `attribute_a`, `attribute_b`, `source_id` (number of the row in the
        source) and, if the source has it, `label`. The foreground has the same position on both sides.

    Raises:
        ValueError: a column is missing; an image cannot be read; a mask is empty, covers the whole image or is no mask;
            one side has no backgrounds; with `keep_own`, an attribute is none of its first two values.
    """
    check_number("soft_edge", soft_edge, 0, math.inf)
    source = with_features(source)
    names, ids = datasets.ClassLabel(names=["0", "1"]), {}
    if attribute in (source.column_names or []):
        names, ids = attribute_ids(source, attribute)
    if backgrounds is None:
        check_columns(source, ["image", mask, attribute])
        is_stream = isinstance(source, datasets.IterableDataset)
        values = np.array([] if is_stream else [ids.get(value, -1) for value in source.with_format(None)[attribute][:]])
        if not {0, 1} <= set(values.tolist()):
            raise ValueError(
                f"without `backgrounds` the source must be map-style, with {attribute!r} both 0 and 1 (or two "
                "texts). Give backgrounds=(images for side a, images for side b)."
            )
        pools = [ImagePool(source, np.flatnonzero(values == value), "the source", mask) for value in (0, 1)]
    else:
        if len(backgrounds) != 2:
            raise ValueError(
                f"backgrounds has {len(backgrounds)} entries: give (images for side a, images for side b)."
            )
        pools = [
            ImagePool(images, None, f"the backgrounds for side {side}")
            for side, images in zip("ab", backgrounds, strict=True)
        ]

    def edit(image: Image.Image, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        alpha = alpha_of(row[mask], image.size, soft_edge)
        sides = []
        if keep_own and ids.get(row[attribute]) not in (0, 1):
            raise ValueError(
                f"keep_own=True needs {attribute!r} to be {' or '.join(map(repr, [*ids][:2]))}, but it is "
                f"{row[attribute]!r}."
            )
        for value, pool in enumerate(pools):
            if keep_own and ids[row[attribute]] == value:
                sides.append(image)
                continue
            drawn = rng.integers(len(pool), size=1 if pool.mask is None else CANDIDATES)
            shows = 0 if pool.mask is None else (pool.filled[drawn] & ~_coarse(row[mask])).sum((1, 2)).argmin()
            fitted = ImageOps.fit(pool.read(int(drawn[shows])), image.size, Image.Resampling.BICUBIC)
            sides.append(Image.composite(image, fitted, alpha))
        return sides[0], sides[1]

    facts = ["background", mask, attribute, ids, soft_edge, keep_own, [pool.stored for pool in pools]]
    return edited(
        source,
        edit,
        names,
        masks=[mask],
        needs=[attribute] if keep_own else [],
        num_pairs=num_pairs,
        seed=seed,
        facts=facts if all(isinstance(pool.stored, datasets.Dataset) for pool in pools) else None,
    )


class ImagePool:
    """Images that others get something of, such as their backgrounds.

    Args:
        images: a `datasets.Dataset` with the column `image`, or a sequence of PIL images.
        rows: the rows of the set that are used. By default all.
        title: name of the set, for messages.
        mask: column of masks of foregrounds that are filled. By default the images have no foreground.
    """

    def __init__(self, images: Any, rows: np.ndarray | None, title: str, mask: str | None = None):
        self.mask, self.title, self.modes = mask, title, {}
        self.rows = np.arange(len(images)) if rows is None else rows
        if not len(self.rows):
            raise ValueError(f"there are no images in {title}: give at least one image.")
        self.stored = images
        if isinstance(images, datasets.Dataset):
            columns = ["image", *([mask] if mask else [])]
            check_columns(images, columns)
            self.stored = stored_images(images.with_format(None).select_columns(columns), columns).select(self.rows)
            self.modes = {name: images.features[name].mode for name in columns}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> Image.Image:
        """Reads an image as RGB, its foreground filled if the images have masks."""
        value, where = self.stored[number], f"of row {self.rows[number]} of {self.title}"
        value = value if isinstance(value, Mapping) else {"image": value}
        image = read_image(value["image"], f"the image {where}", self.modes.get("image")).convert("RGB")
        if self.mask is None:
            return image
        mask = read_mask(value[self.mask], f"the mask {where}", self.modes[self.mask], image)
        try:
            return fill_foreground(image, mask)
        except ValueError as failure:
            raise ValueError(f"the image {where}: {failure}") from failure

    @cached_property
    def filled(self) -> np.ndarray:
        """Returns where the foregrounds are: bool (n, COARSE, COARSE)."""
        masks = self.stored[self.mask]
        places = (f"the mask of row {row} of {self.title}" for row in self.rows)
        mode = self.modes[self.mask]
        return np.stack([_coarse(read_mask(v, where, mode)) for v, where in zip(masks, places, strict=True)])


def fill_foreground(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Fills the foreground of an image from the background around it, and blurs the fill.

    Args:
        image: an image of any mode that converts to RGB.
        mask: 0 background, 255 foreground. It is resized to the image.

    Raises:
        ValueError: the mask covers the whole image.
    """
    image = image.convert("RGB")
    grown = filled_region(mask.resize(image.size))
    inside = np.asarray(grown) > 0
    filled = _filled(image, inside).filter(ImageFilter.GaussianBlur(FILL_BLUR))
    return Image.composite(filled, image, grown)


def filled_region(mask: Image.Image) -> Image.Image:
    """The region that [`fill_foreground`] fills, 255: the foreground of a mask and a margin around it."""
    return mask.convert("L").point(lambda value: 255 * (value > 32)).filter(ImageFilter.MaxFilter(FILL_MARGIN))


def _filled(image: Image.Image, inside: np.ndarray) -> Image.Image:
    """Fills a region, bool (H, W): each of its pixels becomes the nearest pixel outside the region."""
    from scipy.ndimage import distance_transform_edt

    if inside.all():
        raise ValueError("the mask or overlay covers the whole image: there is nothing to fill it from.")
    _, (rows, columns) = distance_transform_edt(inside, return_indices=True)
    return Image.fromarray(np.asarray(image)[rows, columns])


def edited(
    source: Any,
    edit: Edit,
    names: Any,
    *,
    facts: Sequence[Any] | None,
    masks: Sequence[str] = (),
    needs: Sequence[str] = (),
    leave_out: Callable[[Mapping[str, Any]], bool] | None = None,
    num_pairs: int | None,
    seed: int,
    skip_unchanged: bool = False,
) -> Any:
    """Makes a pair of each row with `edit`.

    Args:
        source: the set of images.
        edit: a function of an RGB image, its row and a generator that returns both sides.
        names: feature of the attribute.
        facts: what the pairs depend on beside the rows, for the name of the cached file. `None`: no hash can tell.
        masks: columns of masks. `edit` gets them in the mode L.
        needs: other columns that `edit` or `leave_out` reads.
        leave_out: whether a row makes no pair.
        num_pairs: number of pairs. `None` makes all.
        seed: seed of the draws.
        skip_unchanged: whether an image that does not change makes no pair, instead of an error.
    """
    check_number("seed", seed, 0, math.inf, whole=True)
    images = ["image", *masks]
    check_columns(source, [*images, *needs])
    stream = isinstance(source, datasets.IterableDataset)
    if stream and num_pairs is not None:
        raise ValueError("a stream has no length: num_pairs needs a map-style set. Use source.take(n).")
    columns, features = source.column_names, source.features
    modes = {name: getattr(features[name], "mode", None) for name in images}
    needed = [name for name in dict.fromkeys((*images, *needs, "label")) if name in columns]
    stored = stored_images(source.with_format(None).select_columns(needed), images)
    made = datasets.Features({"image_a": datasets.Image(), "image_b": datasets.Image()})
    made |= {"label": features["label"]} if "label" in columns else {}
    made |= {"attribute_a": names, "attribute_b": names, "source_id": datasets.Value("int64")}

    def left_out(row: Mapping[str, Any], number: int) -> bool:
        try:
            return leave_out is not None and leave_out(row)
        except ValueError as failure:
            raise ValueError(f"row {number}: {failure}") from failure

    def pair(row: dict[str, Any], number: int) -> dict[str, Any]:
        where = f"row {number}{file_of(row['image'])}"
        image, own = read_rgb(row["image"], f"the image of row {number}", modes["image"])
        read = {name: read_mask(row[name], f"the mask of row {number}", modes[name], image) for name in masks}
        try:
            a, b = edit(image, {**row, **read}, np.random.default_rng((seed, 5, number)))
        except ValueError as failure:
            raise ValueError(f"{where}: {failure}") from failure
        is_alike = a.size == b.size and a.mode == b.mode
        if skip_unchanged and is_alike and ImageChops.difference(a, b).getbbox() is None:
            return {**dict.fromkeys(made), "source_id": UNCHANGED}
        if not is_alike or ImageChops.difference(a, b).getbbox() is None:
            raise ValueError(
                f"the two sides of {where} are equal, or differ in size or mode ({a.mode} {a.size}, {b.mode} "
                f"{b.size}): the edit must change every image. Leave out rows that it does not change "
                "(skip_unchanged=True)."
            )
        sides = [a, b]
        if not stream:
            sides = [own if own and side is image else {"bytes": encode_image(side), "path": None} for side in sides]
        label = {"label": row["label"]} if "label" in row else {}
        values = {"attribute_a": 0, "attribute_b": 1, "source_id": number}
        return {"image_a": sides[0], "image_b": sides[1], **label, **values}

    if stream:

        def pairs(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            found = [pair(row, n) for row, n in zip(rows, numbers, strict=True) if not left_out(row, n)]
            found = [row for row in found if row["source_id"] != UNCHANGED]
            return {name: [row[name] for row in found] for name in made}

        options = {"batched": True, "batch_size": 1, "with_indices": True}
        return stored.map(pairs, **options, remove_columns=needed, features=made)
    rows = np.arange(len(source))
    if leave_out:
        rows = rows[[not left_out(row, number) for number, row in enumerate(stored.select_columns(list(needs)))]]
        if not len(rows) and skip_unchanged:
            return datasets.Dataset.from_dict({name: [] for name in made}, features=made)
        if not len(rows):
            raise ValueError(
                f"all {len(source)} images have the overlay already, so that none is left to lay it over: add images "
                "without it, or set fill_present=True."
            )
    rows = rows[draw_rows(len(rows), num_pairs, seed=seed, of="source rows")]
    pairs = map_cached(
        stored.select(rows),
        lambda row, place: pair(row, int(rows[place])),
        None if facts is None else [*facts, modes, rows.tolist(), seed, *(["skip"] if skip_unchanged else [])],
        remove_columns=needed,
        features=made,
    )
    changed = np.flatnonzero(np.asarray(pairs["source_id"][:]) != UNCHANGED)
    if len(changed) == len(pairs):
        return pairs
    logger.warning(f"{len(pairs) - len(changed)} of {len(pairs)} images make no pair: the edit does not change them.")
    return pairs.select(changed)


def with_features(source: Any) -> Any:
    """Checks that a source is a set; returns a stream whose features are unknown with those of its first rows."""
    check_is_set(source, "the source", or_stream=True)
    if not isinstance(source, datasets.IterableDataset) or source.features is not None:
        return source
    try:
        return source._resolve_features()
    except pa.ArrowInvalid as failure:  # rows with PIL images
        raise ValueError(
            "the stream does not say what its columns are: name them, "
            "IterableDataset.from_generator(..., features=Features(image=Image(), ...))."
        ) from failure


def attribute_ids(source: Any, attribute: str) -> tuple[Any, dict[Any, int]]:
    """Returns the feature of an attribute in a pair set, and the id of each of its values."""
    feature = _attribute_feature(source, attribute)
    if is_class_label(feature):
        return feature, {number: number for number in range(feature.num_classes)}
    if feature.dtype == "bool":
        return datasets.ClassLabel(names=["False", "True"]), {False: 0, True: 1}
    if not is_text(feature):
        return feature, {0: 0, 1: 1}
    if isinstance(source, datasets.IterableDataset):
        raise ValueError(
            f"the values of {attribute!r} are texts, and a stream does not tell which there are: cast the column, "
            f"cast_column({attribute!r}, datasets.ClassLabel(names=[...]))."
        )
    names = sorted_names({value for value in source.with_format(None)[attribute][:] if value is not None})
    if len(names) != 2:
        raise ValueError(f"{attribute!r} must have two values, but has {names}: drop the rows of the others.")
    return datasets.ClassLabel(names=names), {name: number for number, name in enumerate(names)}


def _presence(source: Any, attribute: str, present: Any) -> Callable[[Any], bool]:
    """Returns a function that says whether a value of `attribute` means that the image has the overlay."""
    feature = _attribute_feature(source, attribute)
    names = feature.names if is_class_label(feature) else None
    is_list = isinstance(present, Collection) and not isinstance(present, str)
    wanted = [*present] if is_list else [] if present is None else [present]
    is_stream = isinstance(source, datasets.IterableDataset)
    known: Collection[Any] = range(len(names)) if names else []
    if not names:
        rows = source.select_columns([attribute]).take(FIRST_ROWS) if is_stream else source.with_format(None)
        known = {row[attribute] for row in rows} if is_stream else {*rows[attribute][:]}
        known = sorted(value for value in known if not _is_missing(value))
    if not wanted and (tuple(name.lower() for name in names) not in ABSENT_PRESENT if names else is_text(feature)):
        raise ValueError(
            f"the column {attribute!r} has the values {names or known}: name the one that means that an image has the "
            "overlay already, present=..."
        )
    for value in wanted if names else ():
        if not isinstance(value, str) and str(value) in names and names.index(str(value)) != value:
            raise ValueError(
                f"present={value!r} is the number of the class {names[value] if value in known else None!r} of "
                f"{attribute!r}, and the name of another: give the name, present={str(value)!r} or another of {names}."
            )
    wanted = [names.index(value) if names and value in names else value for value in wanted]
    for value in wanted:
        if value in known:
            continue
        if not is_stream or names:
            raise ValueError(f"present={present!r} is no value of {attribute!r}, which has {names or known}: name one.")
        logger.warning(
            f"present={present!r} is no value of {attribute!r} in the first rows of the stream, which have {known}."
        )
    allowed = None if wanted else {0, 1}
    wanted = wanted or [1]

    def has_overlay(value: Any) -> bool:
        if _is_missing(value) or (names and value == -1) or (allowed and value not in allowed):
            raise ValueError(
                f"{attribute}={value!r} does not say whether an image has the overlay: drop the rows, or name all "
                "values that mean it, present=[...]."
            )
        return value in wanted

    for value in () if names else known:
        has_overlay(value)
    return has_overlay


def _attribute_feature(source: Any, attribute: str) -> Any:
    check_columns(source, [attribute])
    feature = source.features[attribute]
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise ValueError(
            f"the column {attribute!r} is a {type(feature).__name__}: an attribute has one name or number a row."
        )
    return feature


def _is_missing(value: Any) -> bool:
    return value is None or value != value


def _recolored(image: Image.Image, change: Recoloring, degrees: float, order: str) -> Image.Image:
    if change == "gray":
        return ImageOps.grayscale(image).convert("RGB")
    if change == "channels":
        return Image.merge("RGB", [image.getchannel(name.upper()) for name in order])
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point(lambda level: (level + round(degrees / 360 * 256)) % 256)
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _stamp(
    overlay: str | Image.Image,
    image_size: tuple[int, int],
    text: str,
    size: float,
    color: tuple[int, int, int],
    place: tuple[float, float] | None,
) -> Image.Image:
    """Draws the overlay on a transparent RGBA image of the given size."""
    width, height = image_size
    length = max(1, round(size * min(image_size)))
    ground = Image.new("RGBA", image_size, (*color, 0))
    draw, full = ImageDraw.Draw(ground), (*color, 255)
    if overlay == "frame":
        draw.rectangle((0, 0, width - 1, height - 1), outline=full, width=length)
        return ground
    if overlay == "ruler":
        draw.rectangle((0, height - length, width - 1, height - 1), fill=full)
        dark = tuple(255 - value for value in color)
        for number, x in enumerate(range(0, width, max(2, length // 4))):
            tick = length // (1 if number % 10 == 0 else 2 if number % 5 == 0 else 4)
            draw.line((x, height - length, x, height - length + max(1, tick) - 1), fill=(*dark, 255))
        return ground
    if overlay == "watermark":
        return _watermark(ground, text, length, full)
    if overlay == "mark":
        stamp = Image.new("RGBA", (length, length), full)
    elif overlay == "text":
        stamp = _written(text, length, full)
    else:
        scale = length / min(overlay.size)
        stamp = overlay.convert("RGBA").resize([max(1, round(side * scale)) for side in overlay.size])
    free = max(0, width - stamp.width), max(0, height - stamp.height)
    at = (
        (0, free[1] if overlay == "text" else 0)
        if place is None
        else [round(p * f) for p, f in zip(place, free, strict=True)]
    )
    ground.paste(stamp, tuple(at))
    return ground


def _written(text: str, height: int, color: tuple[int, int, int, int]) -> Image.Image:
    font = ImageFont.load_default(height)
    left, top, right, bottom = font.getbbox(text)
    stamp = Image.new("RGBA", (max(1, math.ceil(right - left)), max(1, math.ceil(bottom - top))), (*color[:3], 0))
    ImageDraw.Draw(stamp).text((-left, -top), text, fill=color, font=font)
    return stamp


def _watermark(ground: Image.Image, text: str, height: int, color: tuple[int, int, int, int]) -> Image.Image:
    stamp = _written(text, height, color)
    stamp = stamp.rotate(30, expand=True, resample=Image.Resampling.BICUBIC)
    for top in range(0, ground.height, stamp.height + height):
        for left in range(0, ground.width, stamp.width + height):
            ground.paste(stamp, (left, top))
    return ground


def read_mask(value: Any, where: str, mode: str | None = None, image: Image.Image | None = None) -> Image.Image:
    """Reads a mask in the mode L: 0 background, 255 foreground.

    If a mask has two values only, 0 and another, the other is the foreground.

    Args:
        value: an encoded mask, or a PIL image.
        where: what the mask is, for messages.
        mode: the mode of its `datasets.Image` feature.
        image: the image of the mask.

    Raises:
        ValueError: the mask is missing or cannot be read; it has colours, values above 255, or small values that are
            not two; it lies on its side, as if its image had been turned.
    """
    mask = read_image(value, where, mode, deep=True)
    where += file_of(value)
    if image is not None and _lies_on_its_side(mask.size, image.size):
        raise ValueError(
            f"{where} has {mask.width}×{mask.height} pixels and its image {image.width}×{image.height}: one of them is "
            "turned. Turn the mask as the EXIF orientation of the image says."
        )
    if mask.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        mask = mask.convert("RGB")
    values = np.asarray(mask)
    if values.ndim == 3:
        if mask.mode in ("RGBA", "LA") and values[..., -1].min() < 255:
            raise ValueError(f"{where} has transparent pixels: store it as a grey image, mask.getchannel('A').")
        values = values[..., :1] if mask.mode == "LA" else values[..., :3]
        if (values != values[..., :1]).any():
            raise ValueError(f"{where} has colours: store it as a grey image, 0 background and 255 foreground.")
        values = values[..., 0]
    found = np.unique(values)
    if len(found) == 2 and found[0] == 0:
        return Image.fromarray(np.uint8(255 * (values > 0)))
    if not (found[0] >= 0 and found[-1] <= 255) or (found[-1] < 128 and found[-1] > 0):
        raise ValueError(
            f"the values of {where} run from {found[0]} to {found[-1]}: a mask must have 0 for the background and 255 "
            "for the foreground, or two values, 0 and another."
        )
    return Image.fromarray(np.uint8(np.rint(values)))


def _lies_on_its_side(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether an image has the shape of another one that was turned by 90 degrees, and not its own."""
    shape, own = np.log(size[0] / size[1]), np.log(other[0] / other[1])
    return abs(shape + own) < 0.02 < abs(shape - own)


def alpha_of(mask: Image.Image, size: tuple[int, int], soft_edge: float) -> Image.Image:
    alpha = mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
    low, high = alpha.getextrema()
    if high < 128 or low > 127:
        raise ValueError(
            f"the mask {'has no foreground' if high < 128 else 'covers the whole image'}: leave its row out."
        )
    return alpha.filter(ImageFilter.GaussianBlur(soft_edge)) if soft_edge else alpha


def _coarse(mask: Image.Image) -> np.ndarray:
    """Shrinks a mask: bool (COARSE, COARSE), true where it has foreground."""
    return np.asarray(mask.resize((COARSE, COARSE), Image.Resampling.BOX)) > 32
