# SPDX-License-Identifier: Apache-2.0
"""Makes pair sets by rendering. Shared by all makers: draws, checks, encoded images and Arrow tables."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import generate_random_fingerprint, get_temporary_cache_files_directory
from filelock import FileLock
from PIL import Image

from .images import check_depth, image_content

CHUNK = 1000  # rows per Arrow chunk: a chunk of binary values has at most 2 GiB
READ_CHUNK = 32  # decoded rows in memory at a time: they may be photographs
WRITTEN = 100  # made rows in memory before they are written
SMALL = 64 * 64  # pixels: for larger images PIL's better compression outweighs its fixed cost per image


def pairs_from_render(
    source: datasets.Dataset | Sequence[Mapping[str, Any]],
    render: Callable[[Mapping[str, Any], Any], Image.Image | np.ndarray],
    attributes: tuple[Any, Any],
    *,
    num_pairs: int | None = None,
    oriented: bool = True,
    seed: int = 0,
    features: Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    """Makes pairs by rendering each source row with both values of the spurious attribute.

    Example: `pairs_from_render(birds, lambda row, place: paste(row["bird"], scenes[place]), ("land", "water"))`.

    Args:
        source: the rows to render. Each row gives one pair.
        render: a function, called as `render(row, attribute)`. It returns a PIL image, or a uint8 array of shape
            (H, W, 3) with values 0 to 255. The two images of a row must have the same size and mode, and must differ.
        attributes: the two values of the attribute, for side a and for side b: names or ints. `render` gets them.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all. With the same seed, a smaller number gives a subset of a larger one.
        oriented: `False` swaps the sides of a random half of the pairs (an ablation).
        seed: non-negative seed of both draws.
        features: features of `label` and `attribute`. They replace those of the source. If neither names a feature,
            `label` gets the type of its values, and the attributes get a ClassLabel of the two values (ints in
            ascending order). If the attribute has a ClassLabel, a str in `attributes` is a name and an int is an id.

    Returns:
        A set with the columns `image_a`, `image_b` (images, stored as PNG), `attribute_a`, `attribute_b` (ClassLabel),
        `source_id` (int64, number of the row in the source) and, if the rows have it, `label`.

    Raises:
        ValueError: the source has fewer rows than `num_pairs`; the two attributes are equal or not in their ClassLabel;
            some rows have a label and others do not; the two images of a row are equal or differ in size or mode.
    """
    rows = draw_rows(len(source), num_pairs, seed=seed, of="source rows")
    label_feature, attribute_feature = _features_of(source, features or {})
    attribute_feature, ids = _attribute_ids(attributes, attribute_feature)
    sides: list[list[bytes]] = []
    labels: list[Any] = []
    for number, row in zip(rows, _read(source, rows), strict=True):
        sides.append(_render_pair(row, int(number), render, attributes))
        if "label" in row:
            labels.append(row["label"])
        if len(labels) not in (0, len(sides)):
            raise ValueError(
                f"row {number} of the source has no label, or the rows before it have none. Give all rows a label, or "
                "none."
            )
    return pair_dataset(
        *zip(*sides, strict=True),
        source_id=rows,
        attributes=ids,
        attribute_feature=attribute_feature,
        label=labels or None,
        label_feature=label_feature,
        swap=None if oriented else draw_swap(len(rows), seed),
    )


def pair_dataset(
    images_a: Sequence[bytes],
    images_b: Sequence[bytes],
    *,
    source_id: np.ndarray | Sequence[int],
    attributes: tuple[int, int],
    attribute_feature: datasets.ClassLabel,
    label: Sequence[Any] | np.ndarray | None = None,
    label_feature: Any = None,
    swap: np.ndarray | None = None,
) -> datasets.Dataset:
    """Makes a pair set from encoded images.

    Args:
        images_a: n encoded images (PNG, JPEG, ...) with the first value of the attribute.
        images_b: n encoded images with the second value of the attribute.
        source_id: n integers that name the source of each pair.
        attributes: ids of the two values in `attribute_feature`.
        attribute_feature: the ClassLabel of the attribute.
        label: n labels: ids or names of `label_feature`.
        label_feature: feature of the label. By default the type of the values.
        swap: n booleans. If one is true, the sides of that pair change places.

    Returns:
        A set with the columns `image_a`, `image_b`, `attribute_a`, `attribute_b`, `source_id` and, if given, `label`.
    """
    swap = np.zeros(len(images_a), dtype=bool) if swap is None else swap
    sides = list(zip(images_a, images_b, strict=True))
    columns: dict[str, tuple[pa.Array | pa.ChunkedArray, Any]] = {
        "image_a": (image_column([sides[i][s] for i, s in enumerate(swap.astype(int))]), datasets.Image()),
        "image_b": (image_column([sides[i][1 - s] for i, s in enumerate(swap.astype(int))]), datasets.Image()),
    }
    if label is not None:
        if isinstance(label_feature, datasets.ClassLabel):
            label = [label_feature.encode_example(value) for value in np.asarray(label).tolist()]
        values = pa.array(np.asarray(label).tolist())
        columns["label"] = (values, label_feature or datasets.features.features.generate_from_arrow_type(values.type))
    for name, (first, second) in {"attribute_a": attributes, "attribute_b": attributes[::-1]}.items():
        columns[name] = (pa.array(np.where(swap, second, first), pa.int64()), attribute_feature)
    columns["source_id"] = (pa.array(np.asarray(source_id), pa.int64()), datasets.Value("int64"))
    return dataset_of(columns)


def dataset_of(columns: Mapping[str, tuple[pa.Array | pa.ChunkedArray, Any]]) -> datasets.Dataset:
    """Makes a data set from Arrow columns, without going through Python rows.

    Args:
        columns: column name -> (values, feature).
    """
    features = datasets.Features({name: feature for name, (_, feature) in columns.items()})
    table = pa.table({name: values for name, (values, _) in columns.items()}).cast(features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def image_column(encoded: Sequence[bytes | Mapping[str, Any]]) -> pa.ChunkedArray:
    """Makes the Arrow column of a `datasets.Image` feature.

    Args:
        encoded: encoded images, as bytes or as the dicts that `datasets.Image(decode=False)` returns.
    """
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    files = [value if isinstance(value, Mapping) else {"bytes": value, "path": None} for value in encoded]
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    return pa.chunked_array(
        [
            pa.StructArray.from_arrays(
                [
                    pa.array([value["bytes"] for value in chunk], pa.binary()),
                    pa.array([value["path"] for value in chunk], pa.string()),
                ],
                fields=[*kind],
            )
            for chunk in chunks
        ],
        kind,
    )


def encode_png(images: np.ndarray) -> list[bytes]:
    """Encodes small images as PNG, about three times as fast as PIL, which has a fixed cost per image.

    Rows of pixels are stored unfiltered and compressed by run lengths (RFC 2083). This suits synthetic images; PIL
    compresses photographs better.

    Args:
        images: uint8, shape (N, H, W, 3), values 0 to 255.

    Returns:
        N encoded images.
    """
    count, height, width, _ = images.shape
    # the zero before each line of pixels is the filter type "none"
    lines = np.zeros((count, height, 1 + 3 * width), dtype=np.uint8)
    lines[:, :, 1:] = images.reshape(count, height, 3 * width)
    start = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    end = _png_chunk(b"IEND", b"")
    files = []
    for image in lines:
        compressor = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
        files.append(start + _png_chunk(b"IDAT", compressor.compress(image) + compressor.flush()) + end)
    return files


def encode_image(image: Image.Image | np.ndarray) -> bytes:
    """Encodes an image as PNG.

    Args:
        image: a PIL image, or a uint8 array of shape (H, W, 3).
    """
    if isinstance(image, Image.Image) and image.mode == "RGB" and image.width * image.height <= SMALL:
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        if image.shape[0] * image.shape[1] <= SMALL:
            return encode_png(image[None])[0]
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def map_cached(
    source: datasets.Dataset, function: Callable, facts: Sequence[Any] | None, **options: Any
) -> datasets.Dataset:
    """Maps the rows of a set, and keeps the result on disk under a hash of all that it depends on.

    `datasets` hashes a function of an importable module by its name, and would return the rows of an older version.

    Args:
        source: rows with encoded images.
        function: a function of a row and its number that returns the new row.
        facts: what the function depends on beside the row and the code of this package: plain values, and sets with
            encoded images. `None`: no hash can tell. Then the result is kept until the process ends.
        **options: further arguments of `Dataset.map`.
    """
    folder = None if facts is None else _cache_folder()
    name = generate_random_fingerprint() if folder is None else content_hash(source, *facts)
    file = f"{folder or get_temporary_cache_files_directory()}/cache-{name}.arrow"
    options = {"desc": "Making pairs", "writer_batch_size": WRITTEN, **options}
    options |= {"new_fingerprint": name, "cache_file_name": file}
    with FileLock(f"{file}.lock"):  # the first of several processes makes the rows, and the others read them
        return source.map(function, with_indices=True, **options)


def array_cached(make: Callable[[], np.ndarray], facts: Sequence[Any] | None) -> np.ndarray:
    """Makes an array, and keeps it on disk under a hash of all that it depends on.

    Args:
        make: makes the array.
        facts: what it depends on, as for [`map_cached`]. `None`: no hash can tell, and nothing is kept.
    """
    folder = None if facts is None else _cache_folder()
    if folder is None:
        return make()
    file = folder / f"{content_hash(*facts)}.npy"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            part = file.with_suffix(".part.npy")
            np.save(part, make())
            os.replace(part, file)
        return np.load(file)


def content_hash(*facts: Any) -> str:
    """Hashes plain values, sets with encoded images, and the code that makes pairs. An image file counts by its path,
    size and time of change."""
    content = hashlib.sha256(_code())
    for fact in facts:
        sets = [fact] if isinstance(fact, datasets.Dataset) else fact if isinstance(fact, list) else []
        if not sets or not all(isinstance(entry, datasets.Dataset) for entry in sets):
            content.update(f"{fact!r}\n".encode())
            continue
        for entry in sets:
            content.update(f"{len(entry)} rows of {entry.features!r}\n".encode())
            table = entry.with_format("arrow")
            for start in range(0, len(entry), CHUNK):
                for column in (chunk := table[start : start + CHUNK]).column_names:
                    is_image = isinstance(entry.features[column], datasets.Image)
                    for value in chunk[column].to_pylist():
                        content.update(image_content(value) if is_image else f"{value!r}\n".encode())
    return content.hexdigest()


@cache
def _code() -> bytes:
    """The source of the modules that make pairs, and the versions of the packages that they use."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent / "inference.py", folder.parent / "models.py"]
    versions = [f"{name} {version(name)}\n".encode() for name in ("datasets", "numpy", "pillow", "scipy")]
    return b"".join([*versions, *(file.read_bytes() for file in files)])


def _cache_folder() -> Path | None:
    """The folder that keeps pairs from one process to the next; `None` if nothing is to be kept, or cannot be."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "pairs"
    if not datasets.is_caching_enabled():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError if the option `name` has a value that is not one of `choices`."""
    choices = [*choices]
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}.")


def check_number(name: str, value: Any, least: float, most: float, *, above: bool = False, whole: bool = False) -> None:
    """Raises ValueError if an option is no finite number within its range.

    Args:
        name: name of the option.
        value: its value.
        least: the smallest value.
        most: the largest value.
        above: whether `least` itself is too small.
        whole: whether the number must be whole.
    """
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    is_number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and least <= value <= most and not (above and value == least):
        return
    limits = [f"{'above' if above else 'from'} {least:g}"] if math.isfinite(least) else []
    limits += [f"up to {most:g}"] if math.isfinite(most) else []
    kind = "whole number" if whole else "finite number"
    raise ValueError(f"{name}={value!r} is not valid: it must be a {' '.join([kind, *limits])}.")


def check_is_set(source: Any, title: str, *, or_stream: bool = False) -> None:
    """Raises a ValueError if an object is no data set with columns. The message names what it is, and the fix.

    Args:
        source: the object; a `datasets.Dataset` is right.
        title: what it is, for the message.
        or_stream: whether a `datasets.IterableDataset` is right too.
    """
    if isinstance(source, datasets.Dataset) or (or_stream and isinstance(source, datasets.IterableDataset)):
        return
    fix = "make one of its rows, datasets.Dataset.from_list(list(rows))."
    if isinstance(source, Mapping):
        fix = f"give one of its sets, [{next(iter(source))!r}]." if source else "give a set."
    elif hasattr(source, "iloc"):
        fix = "make one of it, datasets.Dataset.from_list(frame.to_dict('records'))."
    elif isinstance(source, datasets.IterableDataset):
        fix = "store rows of it, Dataset.from_list(list(stream.decode(False).take(1000)), features=stream.features)."
    wanted = "datasets.Dataset or IterableDataset" if or_stream else "datasets.Dataset"
    raise ValueError(f"{title} must be a {wanted}, but is of type {type(source).__name__}: {fix}")


def check_columns(source: Any, wanted: Iterable[str]) -> None:
    """Raises ValueError if a source of images has not all of the wanted columns."""
    names = list(source.column_names or [])
    for name in wanted:
        if name not in names:
            raise ValueError(f"the source has no column {name!r}, only {names}: rename_column gives it one.")


def known_values(source: datasets.Dataset, column: str, title: str = "the source") -> np.ndarray:
    """Returns the values of a column, all of which are known.

    Args:
        source: the set.
        column: name of the column.
        title: name of the set, for the message.

    Raises:
        ValueError: a value is None, NaN, or -1 of a ClassLabel.
    """
    values = source.with_format(None)[column][:]
    unknown = -1 if isinstance(source.features[column], datasets.ClassLabel) else None
    missing = [row for row, value in enumerate(values) if value is None or value != value or value == unknown]
    if missing:
        raise ValueError(
            f"row {missing[0]} of {title} has no {column} ({values[missing[0]]!r}), as {len(missing)} of {len(values)} "
            f"rows: drop them, or give them a {column}."
        )
    return np.asarray(values)


def draw_rows(available: int, wanted: int | None, *, seed: int, of: str) -> np.ndarray:
    """Draws rows without replacement.

    Args:
        available: number of rows.
        wanted: number of rows to draw. `None` draws all.
        seed: non-negative seed of the draw. With the same seed, fewer rows are a subset of more.
        of: what the rows are, for the message.

    Returns:
        Ascending row numbers.

    Raises:
        ValueError: there are no rows; `wanted` is below 1 or above `available`.
    """
    check_number("seed", seed, 0, math.inf, whole=True)
    wanted = available if wanted is None else wanted
    check_number("num_pairs", wanted, -math.inf, math.inf, whole=True)
    if available == 0:
        raise ValueError(f"there are no {of} to make pairs of: the source is empty.")
    if not 1 <= wanted <= available:
        raise ValueError(
            f"num_pairs={wanted}, but {available} {of} give 1 to {available} pairs, one each. Ask for fewer pairs, or "
            "for all with num_pairs=None."
            if wanted > 0
            else f"num_pairs={wanted} must be at least 1, or None for all of the {available} {of}."
        )
    return np.sort(np.random.default_rng((seed, 0)).permutation(available)[:wanted])


def draw_swap(count: int, seed: int) -> np.ndarray:
    """Draws which pairs change sides: `count` booleans, of which a random half (rounded down) is true."""
    return np.random.default_rng((seed, 1)).permutation(count) < count // 2


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _features_of(source: Any, given: Mapping[str, Any]) -> tuple[Any, datasets.ClassLabel | None]:
    """Returns the features of the label and of the attribute, or `None` for an unknown one."""
    unknown = set(given) - {"label", "attribute"}
    if unknown:
        raise ValueError(
            f"features={sorted(unknown)} are unknown: it may have entries for 'label' and 'attribute' only."
        )
    own = source.features if isinstance(source, datasets.Dataset) else {}
    features = {**own, **given}
    attribute = features.get("attribute")
    return features.get("label"), attribute if isinstance(attribute, datasets.ClassLabel) else None


def _attribute_ids(
    attributes: Sequence[Any], feature: datasets.ClassLabel | None
) -> tuple[datasets.ClassLabel, tuple[int, int]]:
    if isinstance(attributes, str) or len(attributes) != 2 or attributes[0] == attributes[1]:
        raise ValueError(f"attributes={attributes!r} must be two different values: one for side a, one for side b.")
    are_ints = [isinstance(value, (int, np.integer)) for value in attributes]
    if feature is None:
        # in ascending order 0 and 1 are the ids "0" and "1", on either side
        names = [str(value) for value in (sorted(attributes) if all(are_ints) else attributes)]
        return datasets.ClassLabel(names=names), (names.index(str(attributes[0])), names.index(str(attributes[1])))
    for value, is_int in zip(attributes, are_ints, strict=True):
        if not (0 <= value < feature.num_classes if is_int else value in feature.names):
            raise ValueError(
                f"the attribute {value!r} is none of {feature.names} (ids 0 to {feature.num_classes - 1}): use one of "
                "them."
            )
    first, second = (
        int(value) if is_int else feature.names.index(value) for value, is_int in zip(attributes, are_ints, strict=True)
    )
    if first == second:
        raise ValueError(f"attributes={attributes!r} are the same value twice: a pair needs two different values.")
    return feature, (first, second)


def _read(source: Any, rows: np.ndarray) -> chain[Mapping[str, Any]]:
    if not isinstance(source, datasets.Dataset):
        return chain(source[int(row)] for row in rows)
    starts = range(0, len(rows), READ_CHUNK)
    return chain.from_iterable(source.__getitems__(rows[start : start + READ_CHUNK].tolist()) for start in starts)


def _render_pair(row: Mapping[str, Any], number: int, render: Callable, attributes: Sequence[Any]) -> list[bytes]:
    sides = [_checked(render(row, value), number, value) for value in attributes]
    kinds = [
        (image.mode, image.size) if isinstance(image, Image.Image) else ("RGB", image.shape[1::-1]) for image in sides
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"row {number} was rendered as {kinds[0][0]} of {kinds[0][1]} pixels with {attributes[0]!r} and "
            f"as {kinds[1][0]} of {kinds[1][1]} with {attributes[1]!r}: both sides must have the same size and mode."
        )
    try:
        files = [encode_image(image) for image in sides]
    except (OSError, SystemError) as failure:
        raise ValueError(
            f"row {number} was rendered in mode {kinds[0][0]}, {kinds[0][1]} pixels, which PNG cannot store "
            f'({failure}). Return image.convert("RGB").'
        ) from failure
    if files[0] == files[1]:
        raise ValueError(
            f"row {number} was rendered the same with attribute {attributes[0]!r} and with {attributes[1]!r}. The two "
            "sides of a pair must differ in the attribute: check that render uses its second argument."
        )
    return files


def _checked(image: Any, number: int, attribute: Any) -> Image.Image | np.ndarray:
    if isinstance(image, Image.Image):
        check_depth(image.mode, f"the image that render gave for row {number}")
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ValueError(
        f"render gave {what} for row {number} and attribute {attribute!r}: it must return a PIL image or a uint8 array "
        "of shape (height, width, 3)."
    )
