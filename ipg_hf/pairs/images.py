# SPDX-License-Identifier: Apache-2.0
"""Reads stored images as `datasets` decodes them. An image that cannot be used is a ValueError: row, file and fix."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError


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
    where += file_of(value)
    if value is None or (isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is None):
        raise ValueError(f"{where} is missing (None): drop the row, or give it an image.")
    if not isinstance(value, (Mapping, Image.Image)):
        raise ValueError(
            f"{where} is a {type(value).__name__}, not an image: cast the column, cast_column(name, datasets.Image())."
        )
    try:
        image = datasets.Image().decode_example(value)
        image.load()
    except Exception as failure:
        # the message of an unknown format holds an address in memory
        unknown = isinstance(failure, UnidentifiedImageError)
        reason = "the format is not one that PIL knows" if unknown else str(failure) or type(failure).__name__
        raise ValueError(
            f"{where} cannot be read as an image ({reason}): replace the image, or drop the row."
        ) from failure
    if not deep:
        check_depth(image, where)
    return image if mode in (None, image.mode) else image.convert(mode)


def check_depth(image: Image.Image, where: str) -> None:
    """Raises a ValueError if an image has more than 8 bits a channel, which conversions cut off at 255."""
    if is_deep(image.mode):
        raise ValueError(
            f"{where} has the mode {image.mode!r}, more than 8 bits a channel, and would become white or black: scale "
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
