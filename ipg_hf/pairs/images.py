# SPDX-License-Identifier: Apache-2.0
"""Reads stored images as `datasets` decodes them. An image that cannot be used is a ValueError: row, file and fix."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
from PIL import ExifTags, Image, UnidentifiedImageError

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def stored_images(source: Any, columns: Iterable[str]) -> Any:
    """Returns a set whose image columns give encoded images, so that reading a row cannot fail.

    Args:
        source: a `datasets.Dataset` or `IterableDataset`. A stream without features is returned as it is.
        columns: the image columns.

    Raises:
        ValueError: a column has another feature than `datasets.Image`.
    """
    for column in columns if source.features else ():
        feature = source.features[column]
        if not isinstance(feature, datasets.Image):
            raise ValueError(
                f"the column {column!r} is a {type(feature).__name__}, not an Image: cast it, "
                f"cast_column({column!r}, datasets.Image())."
            )
        source = source.cast_column(column, datasets.Image(mode=feature.mode, decode=False))
    return source


def read_image(value: Any, where: str, mode: str | None = None, *, deep: bool = False) -> Image.Image:
    """Decodes an image as `datasets` does: turned as its EXIF orientation says, in the mode of its feature.

    Args:
        value: an encoded image (`{"bytes": ..., "path": ...}`), or a PIL image.
        where: what the image is, for messages, for example `"image_a of row 3"`.
        mode: the mode of the image's `datasets.Image` feature.
        deep: accept more than 8 bits a channel.

    Raises:
        ValueError: there is no image, it cannot be decoded, or it has more than 8 bits a channel.
    """
    where = _named(value, where)
    try:
        image = datasets.Image().decode_example(value)
        image.load()
    except Exception as failure:
        raise _unreadable(where, failure) from failure
    if not deep:
        check_depth(image.mode, where)
    return image if mode in (None, image.mode) else image.convert(mode)


def read_rgb(value: Any, where: str, mode: str | None = None) -> tuple[Image.Image, Any]:
    """Decodes an image as RGB, and says whether its file holds this very image.

    Args:
        value: an encoded image, or a PIL image.
        where: what the image is, for messages.
        mode: the mode of its `datasets.Image` feature.

    Returns:
        The image; and `value`, or `None` if the image was converted. An image that is kept as its file (a JPEG, say) is
        smaller, and recognised as a training image.

    Raises:
        ValueError: there is no image, it cannot be decoded, or it has more than 8 bits a channel.
    """
    file = read_image(value, where)
    image = file if mode in (None, file.mode) else file.convert(mode)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image, value if image is file else None


def image_kind(value: Any, where: str, mode: str | None = None) -> tuple[tuple[int, int], str]:
    """Returns size and mode of an image as `datasets` would decode it, from the header of its file alone.

    Args:
        value: an encoded image.
        where: what the image is, for messages.
        mode: the mode of its `datasets.Image` feature.

    Raises:
        ValueError: there is no image, its header cannot be read, or it has more than 8 bits a channel.
    """
    where = _named(value, where)
    try:
        with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as image:
            size, own = upright_size(image), image.mode
    except Exception as failure:
        raise _unreadable(where, failure) from failure
    check_depth(own, where)
    return size, mode or own


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns the size that an image will have when it is decoded and turned as its EXIF orientation says.

    Args:
        image: an image that was opened and not decoded.
    """
    # a PNG's own getexif would decode the pixels; a TIFF's size is turned already
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return image.size[::-1] if orientation in SIDEWAYS and image.format != "TIFF" else image.size


def check_depth(mode: str, where: str) -> None:
    """Raises a ValueError if images of a PIL mode have more than 8 bits a channel: conversions cut them off at 255."""
    if is_deep(mode):
        raise ValueError(
            f"{where} has the mode {mode!r}, more than 8 bits a channel, and would become white or black: scale "
            "its values to 0..255 and store it in 8 bits, Image.fromarray(array.astype('uint8'))."
        )


def is_deep(mode: str) -> bool:
    """Whether images of a PIL mode have more than 8 bits a channel: whole numbers of 16 or 32 bits, or floats."""
    return mode.startswith(("I", "F"))


def file_of(value: Any) -> str:
    """Returns the name of an encoded image's file for messages, in brackets, or `""`."""
    path = value.get("path") if isinstance(value, Mapping) else getattr(value, "filename", None)
    return f" ({path})" if path else ""


def image_content(value: Mapping[str, Any] | None) -> bytes:
    """Returns what identifies an encoded image: its bytes after their number, or path, size and time of change."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return b"none\n"
    if value["bytes"] is not None:
        return len(value["bytes"]).to_bytes(8, "big") + value["bytes"]
    if not os.path.exists(value["path"]):
        return f"{value['path']}\n".encode()
    facts = os.stat(value["path"])
    return f"{os.path.abspath(value['path'])} {facts.st_size} {facts.st_mtime_ns}\n".encode()


def _named(value: Any, where: str) -> str:
    """Returns `where` with the name of the file. Raises a ValueError if there is no image."""
    where += file_of(value)
    if value is None or (isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is None):
        raise ValueError(
            f"{where} cannot be read as an image: there is none (None). Drop the row, or give it an image."
        )
    if not isinstance(value, (Mapping, Image.Image)):
        raise ValueError(
            f"{where} is a {type(value).__name__}, not an image: cast the column, cast_column(name, datasets.Image())."
        )
    return where


def _unreadable(where: str, failure: Exception) -> ValueError:
    # the message of an unknown format holds an address in memory
    unknown = isinstance(failure, UnidentifiedImageError)
    reason = "cannot identify the format" if unknown else str(failure) or type(failure).__name__
    return ValueError(f"{where} cannot be read as an image: {reason}. Replace the image, or drop the row.")
