# SPDX-License-Identifier: Apache-2.0
"""Pairs by editing: one image as it is and once more with another colour, with something laid over it, or on another
background. Each row's draws are a function of the seed and its number alone; streams stay streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import datasets
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from .makers import draw_rows, encode_image

Recoloring = Literal["hue", "channels", "gray"]
Overlay = Literal["mark", "frame", "text", "watermark", "ruler"]
Edit = Callable[[Image.Image, Mapping[str, Any], np.random.Generator], tuple[Image.Image, Image.Image]]

FILL_MARGIN = 9  # pixels, odd: the edge of a mask is not exact, and what is left of a foreground would be copied
FILL_BLUR = 6.0  # pixels
CANDIDATES = 16  # backgrounds drawn for a side, of which the one is taken whose filled part is hidden best
COARSE = 32  # pixels a side of the masks that are compared for it


def recolor_pairs(
    source: Any,
    *,
    change: Recoloring = "hue",
    amount: float | None = None,
    order: str = "grb",
    attribute: str | None = None,
    num_pairs: int | None = None,
    seed: int = 0,
) -> Any:
    """Pairs of an image and the same in other colours.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` with a column `image`, and a `label` where there is one.
        change: `"hue"` turns the hue; `"channels"` exchanges colour channels; `"gray"` takes the colour away.
        amount: degrees by which the hue turns; `None` draws 60 to 300 for each image.
        order: for `"channels"`, which channel each channel is taken from: `"grb"` exchanges red and green.
        attribute: column of a binary attribute that the change turns into its other value (red and green digits under
            `"channels"`): the side with the value 0 comes first, so that pairs are oriented.
        num_pairs: number of rows to use, drawn without replacement, in the order of the source; `None`: all. Not for a
            stream.
        seed: non-negative; seed of all draws.

    Returns:
        A set with the columns `image_a`, `image_b`, `attribute_a`, `attribute_b`, `source_id` (the row's number), and
        `label`. Without `attribute` side a is the original.

    Raises:
        ValueError: `change` or `order` is unknown; a column is missing; an image is grey already.
    """
    _check_choice("change", change, Recoloring)
    if len(order) != 3 or not set(order) <= set("rgb"):
        raise ValueError(f"order={order!r} must be three of r, g and b, e.g. 'grb'.")

    def edit(image: Image.Image, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        other = _recolored(image, change, amount if amount is not None else rng.uniform(60, 300), order)
        return (other, image) if attribute is not None and row[attribute] else (image, other)

    feature = source.features.get(attribute) if attribute and source.features else None
    names = feature or datasets.ClassLabel(names=["0", "1"] if attribute else ["original", "recolored"])
    return _edited(source, edit, names, needs=[attribute] if attribute else [], num_pairs=num_pairs, seed=seed)


def overlay_pairs(
    source: Any,
    *,
    overlay: Overlay | Image.Image | Callable[[Image.Image, np.random.Generator], Image.Image] = "text",
    text: str = "SAMPLE",
    size: float = 0.2,
    opacity: float = 1.0,
    color: tuple[int, int, int] = (255, 255, 255),
    random_position: bool = False,
    attribute: str | None = None,
    fill_present: bool = False,
    num_pairs: int | None = None,
    seed: int = 0,
) -> Any:
    """Pairs of an image and the same with something laid over it.

    Args:
        source: as in [`recolor_pairs`]. Images that have the overlay already are named by `attribute`.
        overlay: `"mark"`, a filled square in the upper left corner; `"frame"`, a border; `"text"`, in the lower left
            corner; `"watermark"`, the text over the whole image, slanted; `"ruler"`, a scale along the lower edge. Or a
            PIL image with transparency, scaled to `size` and put into the upper left corner; or a function of (image,
            generator) that returns the changed image.
        text: of a text or a watermark.
        size: of the overlay, as a share of the image's shorter side, in (0, 1]. Of a frame: its width.
        opacity: in (0, 1].
        color: red, green and blue, 0 to 255.
        random_position: put marks, texts and images anywhere, drawn for each image.
        attribute: column that tells which images have the overlay already (value not 0): they are left out.
        fill_present: do not leave them out: side b is such an image as it is, and on side a the place where `overlay`
            would lie is filled from around it. Where an attribute goes with a label this gives pairs of all labels.
            Needs `attribute`, and an overlay at a fixed place.
        num_pairs: as in [`recolor_pairs`].
        seed: non-negative; seed of all draws.

    Returns:
        As [`recolor_pairs`]; side a is the original, side b has the overlay.

    Raises:
        ValueError: `overlay` is unknown, `size` or `opacity` out of range; a column is missing; the overlay changes
            nothing in an image; `fill_present` without `attribute`, with a function or with a random position.
    """
    if isinstance(overlay, str):
        _check_choice("overlay", overlay, Overlay)
    for name, value in (("size", size), ("opacity", opacity)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} is not valid: it must be in (0, 1].")
    if fill_present and (attribute is None or callable(overlay) or random_position):
        raise ValueError("fill_present=True needs attribute=..., and an overlay (no function) at a fixed place.")

    def edit(image: Image.Image, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        if callable(overlay):
            return image, overlay(image.copy(), rng)
        place = tuple(rng.random(2)) if random_position else None
        stamp = _stamp(overlay, image.size, text, size, tuple(color), place)
        if fill_present and row[attribute]:
            return _filled(image, np.asarray(stamp.getchannel("A")) > 0), image
        alpha = stamp.getchannel("A").point(lambda value: round(value * opacity))
        stamp.putalpha(alpha)
        return image, Image.alpha_composite(image.convert("RGBA"), stamp).convert("RGB")

    names = datasets.ClassLabel(names=["without", "with"])
    which = {"needs": [attribute]} if fill_present else {"needs": [], "leave_out": attribute}
    return _edited(source, edit, names, **which, num_pairs=num_pairs, seed=seed)


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
    """Pairs of one foreground on two backgrounds, as in Waterbirds, of any segmented set.

    Args:
        source: as in [`recolor_pairs`], with a column of masks.
        backgrounds: two sets of images for side a and side b: `datasets.Dataset`s with a column `image`, or sequences
            of PIL images. By default both come from the source itself: its images of attribute 0 and 1, the foreground
            filled from around it (our reading; clean photographs are better). Of 16 drawn ones that is taken whose
            filled part the new foreground hides best.
        mask: column of masks, images of one channel, 0 background and 255 foreground; resized to the image.
        attribute: column of a binary attribute, the kind of background; used where `backgrounds` is not given, and by
            `keep_own`.
        soft_edge: radius in pixels of the Gaussian blur of the mask, for the transition between the two; 0 or more.
        keep_own: the side of the image's own kind is the image as it is, and the other alone is composed: pairs for
            `pair_source="batch"`. What composing leaves behind then tells the sides apart too.
        num_pairs: as in [`recolor_pairs`].
        seed: non-negative; seed of all draws.

    Returns:
        As [`recolor_pairs`]; a foreground stands at the same spot on both sides.

    Raises:
        ValueError: a column is missing; a mask is empty or covers all; there are no backgrounds of a kind; with
            `keep_own` an attribute is neither 0 nor 1.
    """
    if soft_edge < 0:
        raise ValueError(f"soft_edge={soft_edge} is not valid: it must be 0 or more pixels.")
    feature = source.features.get(attribute) if source.features else None
    if backgrounds is None:
        _check_columns(source, ["image", mask, attribute])
        values = np.asarray(source[attribute][:]) if isinstance(source, datasets.Dataset) else None
        if values is None or not {0, 1} <= set(values.tolist()):
            raise ValueError(f"without `backgrounds` the source must be map-style, with {attribute!r} both 0 and 1.")
        own = source.select_columns(["image", mask])
        backgrounds = tuple(own.select(np.flatnonzero(values == value)) for value in (0, 1))
    for side, images in zip("ab", backgrounds, strict=True):
        if not len(images):
            raise ValueError(f"there are no backgrounds for side {side}.")

    shapes = [_coarse(images[mask]) if mask in getattr(images, "column_names", []) else None for images in backgrounds]

    def edit(image: Image.Image, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        alpha = _alpha(row[mask], image.size, soft_edge)
        sides = []
        if keep_own and row[attribute] not in (0, 1):
            raise ValueError(f"keep_own=True needs {attribute!r} to be 0 or 1, but it is {row[attribute]!r}.")
        for value, (images, filled) in enumerate(zip(backgrounds, shapes, strict=True)):
            if keep_own and row[attribute] == value:
                sides.append(image)
                continue
            drawn = rng.integers(len(images), size=1 if filled is None else CANDIDATES)
            shows = 0 if filled is None else (filled[drawn] & ~_coarse([row[mask]])).sum((1, 2)).argmin()
            found = images[int(drawn[shows])]
            if isinstance(found, Mapping):
                found = fill_foreground(found["image"], found[mask]) if mask in found else found["image"]
            fitted = ImageOps.fit(found.convert("RGB"), image.size, Image.Resampling.BICUBIC)
            sides.append(Image.composite(image, fitted, alpha))
        return sides[0], sides[1]

    names = feature if isinstance(feature, datasets.ClassLabel) else datasets.ClassLabel(names=["0", "1"])
    needs = [mask, attribute] if keep_own else [mask]
    return _edited(source, edit, names, needs=needs, num_pairs=num_pairs, seed=seed)


def fill_foreground(image: Image.Image, mask: Image.Image) -> Image.Image:
    """An image whose foreground is filled from the background around it, softly.

    Args:
        image: any mode that converts to RGB.
        mask: 0 background, 255 foreground; resized to the image.

    Raises:
        ValueError: the mask covers all of the image.
    """
    image = image.convert("RGB")
    grown = mask.convert("L").resize(image.size).point(lambda value: 255 * (value > 32))
    grown = grown.filter(ImageFilter.MaxFilter(FILL_MARGIN))
    inside = np.asarray(grown) > 0
    filled = _filled(image, inside).filter(ImageFilter.GaussianBlur(FILL_BLUR))
    return Image.composite(filled, image, grown)


def _filled(image: Image.Image, inside: np.ndarray) -> Image.Image:
    """The image with each pixel of a region, bool (H, W), as the nearest one outside it."""
    from scipy.ndimage import distance_transform_edt

    if inside.all():
        raise ValueError("the mask or overlay covers the whole image: there is nothing to fill it from.")
    _, (rows, columns) = distance_transform_edt(inside, return_indices=True)
    return Image.fromarray(np.asarray(image)[rows, columns])


def _edited(
    source: Any,
    edit: Edit,
    names: datasets.ClassLabel,
    *,
    needs: Sequence[str],
    num_pairs: int | None,
    seed: int,
    leave_out: str | None = None,
) -> Any:
    """The pairs that `edit` makes of the rows, but for those whose column `leave_out` is not 0."""
    _check_columns(source, ["image", *needs, *([leave_out] if leave_out else [])])
    stream = isinstance(source, datasets.IterableDataset)
    if stream and num_pairs is not None:
        raise ValueError("a stream has no length: num_pairs needs a map-style set. Use take(n).")
    columns = source.column_names
    features = datasets.Features({"image_a": datasets.Image(), "image_b": datasets.Image()})
    if "label" in columns:
        features["label"] = source.features["label"] if source.features else datasets.Value("int64")
    features |= {"attribute_a": names, "attribute_b": names, "source_id": datasets.Value("int64")}

    def pair(row: dict[str, Any], number: int) -> dict[str, Any]:
        image = row["image"] if row["image"].mode == "RGB" else row["image"].convert("RGB")
        a, b = edit(image, row, np.random.default_rng((seed, 5, number)))
        if a.size != b.size or a.mode != b.mode or ImageChops.difference(a, b).getbbox() is None:
            raise ValueError(
                f"the two sides of row {number} are equal, or of different size or mode ({a.mode} {a.size}, {b.mode} "
                f"{b.size}): the change must show in every image. Leave such rows out."
            )
        label = {"label": row["label"]} if "label" in row else {}
        return {"image_a": a, "image_b": b, **label, "attribute_a": 0, "attribute_b": 1, "source_id": number}

    if stream:
        source = source.filter(lambda value: not value, input_columns=leave_out) if leave_out else source
        return source.map(pair, with_indices=True, remove_columns=columns, features=features)
    rows = np.flatnonzero(np.asarray(source[leave_out][:]) == 0) if leave_out else np.arange(len(source))
    rows = rows[draw_rows(len(rows), num_pairs, seed=seed, of="source rows")]
    needed = [name for name in dict.fromkeys(("image", *needs, "label")) if name in columns]
    chosen = source.with_format(None).select_columns(needed).select(rows)
    stored = chosen.select_columns("image").cast_column("image", datasets.Image(decode=False))

    def numbered(row: Mapping[str, Any], place: int) -> dict[str, Any]:
        made = pair(row, int(rows[place]))
        for name in ("image_a", "image_b"):
            # the image itself stays what it was, a JPEG say: smaller, and known again as one of the training images
            is_own = made[name] is row["image"]
            made[name] = stored[place]["image"] if is_own else {"bytes": encode_image(made[name]), "path": None}
        return made

    return chosen.map(numbered, with_indices=True, remove_columns=needed, features=features, desc="Making pairs")


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
    """The overlay on a transparent ground of the image's size, RGBA."""
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


def _alpha(mask: Image.Image, size: tuple[int, int], soft_edge: float) -> Image.Image:
    alpha = mask.convert("L")
    alpha = alpha if alpha.size == size else alpha.resize(size, Image.Resampling.BILINEAR)
    low, high = alpha.getextrema()
    if high < 128 or low > 127:
        raise ValueError(
            f"a mask {'has no foreground' if high < 128 else 'covers all of the image'}: leave its row out."
        )
    return alpha.filter(ImageFilter.GaussianBlur(soft_edge)) if soft_edge else alpha


def _coarse(masks: Iterable[Image.Image]) -> np.ndarray:
    """Where n masks have a foreground, bool (n, COARSE, COARSE)."""
    return np.stack(
        [np.asarray(mask.convert("L").resize((COARSE, COARSE), Image.Resampling.BOX)) > 32 for mask in masks]
    )


def _check_columns(source: Any, wanted: Sequence[str]) -> None:
    names = list(source.column_names or [])
    for name in wanted:
        if name not in names:
            raise ValueError(f"the source has no column {name!r}, only {names}.")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(get_args(choices))}.")
