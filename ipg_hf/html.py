# SPDX-License-Identifier: Apache-2.0
"""Writes HTML pages that need no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def rendered(template: str, filters: Mapping[str, Any] | None = None, **values: Any) -> str:
    """Fills in a template of the package.

    Args:
        template: path of the template in the package.
        filters: further filters by name. The filter `uri` is [`png_uri`].
        **values: every name that the template uses. They are escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ipg_hf", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"uri": png_uri, **(filters or {})}
    return environment.get_template(template).render(**values)


def png_uri(image: Image.Image | bytes) -> str:
    """Returns an image, or the bytes of a PNG file, as a data URI."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def write_files(files: Mapping[Path, bytes]) -> None:
    """Writes all files or, if one of them cannot be written, none. Folders are made."""
    partial = {file.with_name(file.name + ".partial"): file for file in files}
    try:
        for part, file in partial.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(files[file])
        for part, file in partial.items():
            os.replace(part, file)
    finally:
        for part in partial:
            part.unlink(missing_ok=True)
