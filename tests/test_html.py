# SPDX-License-Identifier: Apache-2.0
"""Pages that need no other file: their images, and files that are written whole or not at all."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipg_hf.html import png_uri, write_files


def test_an_image_and_a_png_file_become_the_same_uri():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    head, data = png_uri(image).split(",")
    assert head == "data:image/png;base64"
    data = base64.b64decode(data)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))
    assert png_uri(data) == png_uri(image)


def test_all_files_are_written_or_none(tmp_path, monkeypatch):
    files = {tmp_path / "new" / "a.html": b"a", tmp_path / "b.json": b"b"}
    write_files(files)
    assert [file.read_bytes() for file in files] == [b"a", b"b"]
    whole = Path.write_bytes

    def full(path, data):
        if path.name.startswith("b"):
            raise OSError("No space left on device")
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_files(dict.fromkeys(files, b"other"))
    assert [file.read_bytes() for file in files] == [b"a", b"b"]
    assert sorted(tmp_path.rglob("*.*")) == sorted(files)
