# SPDX-License-Identifier: Apache-2.0
"""Makes pairs by editing images: other colours, an overlay, or another background.

The draws of a row depend on the seed and the row's number alone. A stream gives a stream of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import datasets
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from .makers import check_choice, check_columns, draw_rows, encode_image

Recoloring = Literal["hue", "channels", "gray"]
Overlay = Literal["mark", "frame", "text", "watermark", "ruler"]
Edit = Callable[[Image.Image, Mapping[str, Any], np.random.Generator], tuple[Image.Image, Image.Image]]

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
) -> Any:
    """Makes pairs of an image and the same image in other colours.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` with the column `image`. The column `label` is optional.
        change: `"hue"` turns the hue; `"channels"` exchanges colour channels; `"gray"` removes the colour.
        amount: degrees by which the hue turns. `None` draws 60 to 300 degrees for each image.
        order: for `"channels"`: the channel from which red, green and blue are taken. `"grb"` exchanges red and green.
        attribute: column of a binary attribute that the change turns into its other value (with `"channels"`, red
            digits become green and green ones red). The image with the value 0 becomes side a, so the pairs are
            oriented.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all. A stream must have `None`.
        seed: non-negative seed of all draws.

    Returns:
        A set with the columns `image_a`, `image_b`, `attribute_a`, `attribute_b`, `source_id` (number of the row in the
        source) and, if the source has it, `label`. Without `attribute`, side a is the original image.

    Raises:
        ValueError: `change` or `order` is unknown; a column is missing; an image does not change (it is grey already).
    """
    check_choice("change", change, get_args(Recoloring))
    if len(order) != 3 or not set(order) <= set("rgb"):
        raise ValueError(f"order={order!r} must be three of the letters r, g and b, for example 'grb'.")

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
    """Makes pairs of an image without and with an overlay.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` with the column `image`. The column `label` is optional.
        overlay: what is put over the image:
            - `"mark"`: a filled square in the upper left corner.
            - `"frame"`: a border.
            - `"text"`: the text in the lower left corner.
            - `"watermark"`: the text over the whole image, slanted.
            - `"ruler"`: a scale along the lower edge.
            - a PIL image with transparency: scaled to `size`, in the upper left corner.
            - a function of (image, generator) that returns the changed image.
        text: the text of `"text"` and `"watermark"`.
        size: size of the overlay as a share of the shorter side of the image, in (0, 1]. For a frame, its width.
        opacity: opacity of the overlay, in (0, 1].
        color: red, green and blue of the overlay, 0 to 255.
        random_position: put a mark, a text or an image at a position that is drawn for each image.
        attribute: column that is not 0 for images that have the overlay already. These images are left out.
        fill_present: use images that have the overlay already. Side b is the image as it is. On side a the area of the
            overlay is filled from the pixels around it. If the overlay occurs with one label only, this gives pairs of
            all labels. It needs `attribute` and an overlay at a fixed position.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all. A stream must have `None`.
        seed: non-negative seed of all draws.

    Returns:
        A set with the columns `image_a` (without the overlay), `image_b` (with it), `attribute_a`, `attribute_b`,
        `source_id` (number of the row in the source) and, if the source has it, `label`.

    Raises:
        ValueError: `overlay` is unknown; `size` or `opacity` is out of range; a column is missing; the overlay does not
            change an image; `fill_present` without `attribute`, with a function or with a random position.
    """
    if isinstance(overlay, str):
        check_choice("overlay", overlay, get_args(Overlay))
    for name, value in (("size", size), ("opacity", opacity)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} is not valid: it must be in (0, 1].")
    if fill_present and (attribute is None or callable(overlay) or random_position):
        raise ValueError("fill_present=True needs attribute=..., and an overlay (no function) at a fixed position.")

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
    """Makes pairs of one foreground on two backgrounds, as in Waterbirds, from any set with masks.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` with the column `image` and a column of masks. The column
            `label` is optional.
        backgrounds: two sets of images, for side a and for side b: `datasets.Dataset`s with the column `image`, or
            sequences of PIL images. By default they are the images of the source with attribute 0 and 1, their
            foreground filled from the pixels around it (our reading; photographs without a foreground are better). In
            this case 16 backgrounds are drawn, and the one is used whose filled part the new foreground hides best.
        mask: column of masks: images of one channel, 0 background and 255 foreground. They are resized to the image.
        attribute: column of a binary attribute, the kind of background. It is used if `backgrounds` is not given, and
            by `keep_own`.
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
        ValueError: a column is missing; a mask is empty or covers the whole image; one side has no backgrounds; with
            `keep_own`, an attribute is neither 0 nor 1.
    """
    if soft_edge < 0:
        raise ValueError(f"soft_edge={soft_edge} is not valid: it must be 0 or more pixels.")
    feature = source.features.get(attribute) if source.features else None
    if backgrounds is None:
        check_columns(source, ["image", mask, attribute])
        values = np.asarray(source[attribute][:]) if isinstance(source, datasets.Dataset) else None
        if values is None or not {0, 1} <= set(values.tolist()):
            raise ValueError(
                f"without `backgrounds` the source must be map-style, with {attribute!r} both 0 and 1. Give "
                "backgrounds=(images for side a, images for side b)."
            )
        own = source.select_columns(["image", mask])
        backgrounds = tuple(own.select(np.flatnonzero(values == value)) for value in (0, 1))
    for side, images in zip("ab", backgrounds, strict=True):
        if not len(images):
            raise ValueError(f"there are no backgrounds for side {side}: give at least one image.")

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
    """Fills the foreground of an image from the background around it, and blurs the fill.

    Args:
        image: an image of any mode that converts to RGB.
        mask: 0 background, 255 foreground. It is resized to the image.

    Raises:
        ValueError: the mask covers the whole image.
    """
    image = image.convert("RGB")
    grown = mask.convert("L").resize(image.size).point(lambda value: 255 * (value > 32))
    grown = grown.filter(ImageFilter.MaxFilter(FILL_MARGIN))
    inside = np.asarray(grown) > 0
    filled = _filled(image, inside).filter(ImageFilter.GaussianBlur(FILL_BLUR))
    return Image.composite(filled, image, grown)


def _filled(image: Image.Image, inside: np.ndarray) -> Image.Image:
    """Fills a region, bool (H, W): each of its pixels becomes the nearest pixel outside the region."""
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
    """Makes a pair of each row with `edit`, except rows whose column `leave_out` is not 0."""
    check_columns(source, ["image", *needs, *([leave_out] if leave_out else [])])
    stream = isinstance(source, datasets.IterableDataset)
    if stream and num_pairs is not None:
        raise ValueError("a stream has no length: num_pairs needs a map-style set. Use source.take(n).")
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
                f"the two sides of row {number} are equal, or differ in size or mode ({a.mode} {a.size}, {b.mode} "
                f"{b.size}): the edit must change every image. Leave out rows that it does not change."
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
            # an unchanged image keeps its file (a JPEG, say): it is smaller, and recognised as a training image
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


def _alpha(mask: Image.Image, size: tuple[int, int], soft_edge: float) -> Image.Image:
    alpha = mask.convert("L")
    alpha = alpha if alpha.size == size else alpha.resize(size, Image.Resampling.BILINEAR)
    low, high = alpha.getextrema()
    if high < 128 or low > 127:
        raise ValueError(
            f"a mask {'has no foreground' if high < 128 else 'covers the whole image'}: leave its row out."
        )
    return alpha.filter(ImageFilter.GaussianBlur(soft_edge)) if soft_edge else alpha


def _coarse(masks: Iterable[Image.Image]) -> np.ndarray:
    """Shrinks n masks: bool (n, COARSE, COARSE), true where a mask has foreground."""
    return np.stack(
        [np.asarray(mask.convert("L").resize((COARSE, COARSE), Image.Resampling.BOX)) > 32 for mask in masks]
    )
