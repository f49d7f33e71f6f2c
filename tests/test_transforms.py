# SPDX-License-Identifier: Apache-2.0
"""Raw images as model inputs: one draw for both sides of a pair, every draw a function of the row's place."""

import os

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from ipg_hf.pairs import ImageRows, PairCollator, PairLoader
from ipg_hf.pairs.transforms import as_model_inputs, process_images

PAIR = {"image_a": "pixel_values_a", "image_b": "pixel_values_b"}
N, SIDE = 12, 16
processors = {
    "transformers": ViTImageProcessor(size={"height": SIDE, "width": SIDE}),
    "timm": TimmWrapperImageProcessor(
        {
            "input_size": [3, SIDE, SIDE],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }
    ),
}
processor = processors["transformers"]


def noise(seed, size=(SIDE, SIDE)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def raw_pairs(n=N, same=True, size=(SIDE, SIDE)):
    """Pairs of noise, each side a copy of the other unless told."""
    columns = {
        "image_a": [noise(i, size) for i in range(n)],
        "image_b": [noise(i if same else n + i, size) for i in range(n)],
        "label": [i % 3 for i in range(n)],
        "source_id": list(range(n)),
    }
    features = {
        "image_a": datasets.Image(),
        "image_b": datasets.Image(),
        "label": datasets.ClassLabel(names=["x", "y", "z"]),
        "source_id": datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def raw_images(n=N):
    return raw_pairs(n).select_columns(["image_a", "label"]).rename_column("image_a", "image")


def pixels(rows, name="pixel_values_a"):
    return torch.stack([row[name] for row in rows])


RANDOM = {"random_flip": True, "random_crop_scale": 0.5, "seed": 5}


@pytest.mark.parametrize("name", processors)
def test_both_sides_get_the_same_draw(name):
    rows = ImageRows(raw_pairs(), processors[name], PAIR, **RANDOM)
    fetched = rows.__getitems__([(position, position % N) for position in range(3 * N)])
    assert torch.equal(pixels(fetched), pixels(fetched, "pixel_values_b"))
    plain = ImageRows(raw_pairs(), processors[name], PAIR)
    assert plain[3]["pixel_values_a"].shape == (3, SIDE, SIDE)
    changed = [not torch.equal(row["pixel_values_a"], plain[i % N]["pixel_values_a"]) for i, row in enumerate(fetched)]
    assert sum(changed) > 2 * N
    other = ImageRows(raw_pairs(same=False), processors[name], PAIR, **RANDOM).__getitems__([(0, 0)])
    assert not torch.equal(other[0]["pixel_values_a"], other[0]["pixel_values_b"])


@pytest.mark.parametrize("name", processors)
def test_the_inputs_are_the_processors(name):
    dataset = raw_pairs(same=False, size=(20, 24))
    rows = ImageRows(dataset, processors[name], PAIR, keep=("label", "attribute"))
    for i, row in enumerate(rows.__getitems__(range(N))):
        assert {*row} == {"pixel_values_a", "pixel_values_b", "label"} and row["label"] == i % 3
        for side in "ab":
            alone = processors[name](dataset[i][f"image_{side}"], return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(row[f"pixel_values_{side}"], alone, rtol=0, atol=1e-6)


def test_flips_happen_half_of_the_time_and_are_flips():
    rows = ImageRows(raw_pairs(), processor, PAIR, random_flip=True, seed=5)
    plain = pixels(ImageRows(raw_pairs(), processor, PAIR).__getitems__(range(N)))
    fetched = pixels(rows.__getitems__([(position, position % N) for position in range(240)]))
    kept = torch.stack([torch.equal(x, plain[i % N]) * torch.ones(()) for i, x in enumerate(fetched)])
    flipped = torch.stack([torch.equal(x.flip(-1), plain[i % N]) * torch.ones(()) for i, x in enumerate(fetched)])
    assert torch.equal(kept + flipped, torch.ones(240))
    assert 90 < kept.sum() < 150  # 4 standard deviations


def test_crops_are_parts_of_the_image_and_resized():
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    dataset = datasets.Dataset.from_dict({"image": [ramp]}, datasets.Features({"image": datasets.Image()}))
    rows = ImageRows(dataset, processor, {"image": "pixel_values"}, random_crop_scale=0.25, seed=5)
    fetched = pixels(rows.__getitems__([(position, 0) for position in range(60)]), "pixel_values")
    left, right = fetched[:, 0, 0, 0], fetched[:, 0, 0, -1]
    share = (right - left) / (250 / 127.5)  # of the ramp, hence of the width
    assert share.min() < 0.6 and share.max() > 0.9 and left.unique().numel() > 20


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (200, 40), (120, 120)])
@pytest.mark.parametrize("scale", [0.01, 0.25, 0.8, 0.99])
def test_crops_have_the_area_and_the_shape_asked_for(size, scale):
    """Each pixel holds its place, and nothing is resized, so that the box of a crop can be read from the crop."""
    width, height = size
    x, y = np.meshgrid(np.arange(width, dtype=np.uint8), np.arange(height, dtype=np.uint8))
    places = Image.fromarray(np.stack([x, y, y], -1))
    dataset = datasets.Dataset.from_dict({"image": [places]}, datasets.Features({"image": datasets.Image()}))
    as_it_is = ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    rows = ImageRows(dataset, as_it_is, {"image": "pixel_values"}, random_crop_scale=scale, seed=5)
    boxes = []
    for position in range(100):
        crop = rows[(position, 0)]["pixel_values"]
        (left, top), (high, wide) = crop[:2, 0, 0].int().tolist(), crop.shape[1:]
        assert torch.equal(crop[0], torch.arange(left, left + wide).float().expand(high, wide))
        assert torch.equal(crop[1], torch.arange(top, top + high).float()[:, None].expand(high, wide))
        assert left + wide <= width and top + high <= height
        boxes.append((left, top, wide / width, high / height))
    left, top, wide, high = np.array(boxes).T
    half_pixels = 0.5 / np.array(size)
    if min(size) * np.sqrt(scale) > 2:  # else whole pixels are too coarse to say more
        tolerance = half_pixels[0] / wide + half_pixels[1] / high  # both sides are rounded to whole pixels
        assert (np.log(wide * high) >= np.log(scale) - 1.1 * tolerance).all()
        assert (np.abs(np.log(wide / high)) < np.log(4 / 3) + 1.1 * tolerance).all()
    if size == (120, 120) and scale == 0.25:
        # the ends of both ranges are reached, and crops lie everywhere
        assert (wide * high).min() < 0.35 and (wide * high).max() > 0.75
        assert (wide / high).min() < 0.8 and (wide / high).max() > 1.25
        assert left.max() > 40 and top.max() > 40 and min(left.min(), top.min()) < 5


def test_draws_are_a_function_of_seed_epoch_position_and_row():
    dataset = raw_pairs()
    rows = ImageRows(dataset, processor, PAIR, **RANDOM)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole = pixels(rows.__getitems__(range(N)))
    assert torch.equal(pixels(rows.__getitems__(range(N))), whole)
    assert torch.equal(pixels([rows[i] for i in range(N)]), whole)  # whatever the batch
    assert torch.equal(pixels(rows.__getitems__([4, 1])), whole[[4, 1]])
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    rows.set_epoch(1)
    assert not any(torch.equal(a, b) for a, b in zip(pixels(rows.__getitems__(range(N))), whole, strict=True))
    rows.set_epoch(0)
    assert torch.equal(pixels(rows.__getitems__(range(N))), whole)
    assert not torch.equal(rows[(7, 0)]["pixel_values_a"], rows[(8, 0)]["pixel_values_a"])
    other = ImageRows(dataset, processor, PAIR, **{**RANDOM, "seed": 6})
    assert not torch.equal(pixels(other.__getitems__(range(N))), whole)


def test_the_epoch_reaches_worker_processes_that_stay():
    rows = ImageRows(raw_pairs(), processor, PAIR, **RANDOM)
    loader = DataLoader(rows, 4, num_workers=2, persistent_workers=True, collate_fn=PairCollator({"pixel_values"}))
    passes = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        expected = [pixels(rows.__getitems__(range(start, start + 4))) for start in range(0, N, 4)]
        passes.append(torch.stack([batch["pixel_values"][:4] for batch in loader]))
        assert torch.equal(passes[-1], torch.stack(expected))
    assert torch.equal(passes[0], passes[2]) and not torch.equal(passes[0], passes[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_pair_loader_draws_the_same_with_workers_and_from_a_position(workers):
    def draw(count, position=0, **kwargs):
        loader = PairLoader(
            ImageRows(raw_pairs(), processor, PAIR, **RANDOM), PairCollator({"pixel_values"}), 5, **kwargs
        )
        loader.position = position
        batches = [next(loader)["pixel_values"] for _ in range(count)]
        loader.close()
        return torch.stack(batches)

    whole = draw(6, seed=1)
    assert all(torch.equal(*batch.chunk(2)) for batch in whole)
    assert torch.equal(draw(6, seed=1, num_workers=workers), whole)
    assert torch.equal(draw(3, position=15, seed=1, num_workers=workers), whole[3:])
    parts = [
        PairLoader(ImageRows(raw_pairs(), processor, PAIR, **RANDOM), PairCollator({"pixel_values"}), size, **kwargs)
        for size, kwargs in [(4, {"seed": 1})] + [(2, {"seed": 1, "rank": rank, "world_size": 2}) for rank in range(2)]
    ]
    for _ in range(4):
        one, first, second = (next(part)["pixel_values"].chunk(2)[0] for part in parts)
        assert torch.equal(torch.cat([first, second]), one)


def test_a_row_is_cropped_anew_in_each_pass_over_the_pairs():
    loader = PairLoader(ImageRows(raw_pairs(1), processor, PAIR, **RANDOM), PairCollator({"pixel_values"}), 1, seed=1)
    passes = torch.stack([next(loader)["pixel_values"][0] for _ in range(10)])
    assert passes.flatten(1).unique(dim=0).shape[0] > 5


def test_columns_that_are_not_needed_are_not_decoded():
    unreadable = [{"bytes": b"no image", "path": None}] * N
    dataset = raw_pairs().add_column("mask", unreadable).cast_column("mask", datasets.Image())
    with pytest.raises(Exception, match="cannot identify image"):
        dataset[0]
    assert {*ImageRows(dataset, processor, PAIR, keep=("label",))[0]} == {*PAIR.values(), "label"}


@pytest.mark.parametrize("name", processors)
@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P", "CMYK"])
def test_images_of_other_modes(mode, name):
    image = noise(0).convert(mode)
    assert image.mode == mode
    inputs = process_images(processors[name], [image, noise(1)])["pixel_values"]
    assert inputs.shape == (2, 3, SIDE, SIDE) and inputs.dtype == torch.float32
    expected = processors[name](image.convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs[:1], expected)
    if mode in ("L", "LA", "1"):
        assert torch.equal(inputs[0, 0], inputs[0, 2])


def test_what_is_no_image_of_eight_bits():
    with pytest.raises(ValueError, match="holds a list, not an image"):
        process_images(processor, [[[1.0]]])
    with pytest.raises(ValueError, match="has the mode 'I;16'"):
        process_images(processor, [Image.fromarray(np.full((4, 4), 30000, np.uint16))])
    unsized = ViTImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match="Where their sizes differ, set its size"):
        process_images(unsized, [noise(0), noise(0, (8, 8))])


def test_preloaded_rows_equal_the_others():
    settings = {"processor": processor, "columns": PAIR, "keep": ("label",)}
    rows, loaded = (ImageRows(raw_pairs(same=False), preload=preload, **settings) for preload in (False, True))
    loaded.processor = None  # nothing is transformed again
    keys = [3, (9, 0), 3, 11]
    for ours, theirs in zip(loaded.__getitems__(keys), rows.__getitems__(keys), strict=True):
        assert ours.keys() == theirs.keys() and ours["label"] == theirs["label"]
        assert all(torch.equal(ours[name], theirs[name]) for name in PAIR.values())
    assert len(loaded) == N


@pytest.mark.parametrize("world", [{}, {"rank": 1, "world_size": 2}, {"num_workers": 2}])
@pytest.mark.parametrize("name", processors)
def test_batches_of_preloaded_pairs_equal_those_of_the_data_loader(name, world):
    dataset, collate = raw_pairs(10, same=False), PairCollator({"pixel_values"}, labels=True)
    plain, loaded = (
        PairLoader(
            ImageRows(dataset, processors[name], PAIR, keep=("label",), preload=preload), collate, 4, seed=3, **world
        )
        for preload in (False, True)
    )
    loaded.dataset.processor = None  # nothing is transformed again
    plain.position = loaded.position = 8
    for _ in range(6):  # more than two passes
        batch = next(loaded)
        assert {*batch} == {"pixel_values", "labels"} and small.bit_equal(batch, next(plain))
        assert plain.position == loaded.position
    plain.close()


def test_faults_of_preloaded_pairs_are_found():
    rows = ImageRows(raw_pairs(), processor, PAIR, keep=("source_id",), preload=True)
    rows.preloaded["pixel_values_b"][7, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values in 'pixel_values', row \d+ .*\(source_id 7\)"):
        next(PairLoader(rows, PairCollator({"pixel_values"}), N, seed=1))
    assert {*next(PairLoader(rows, PairCollator({"pixel_values"}, labels=True), 1, seed=0))} == {"pixel_values"}


def end_of_training(folder, preload, seed=0):
    sets = {"one": raw_pairs(10, same=False), "other": raw_pairs(7, same=False)}
    sets = {name: ImageRows(pairs, processor, PAIR, preload=preload) for name, pairs in sets.items()}
    settings = {"max_steps": 5, "learning_rate": 1e-3, "data_seed": seed}
    training = small.trainer(folder, small.vit(), small.rows(24), sets, processing_class=processor, **settings)
    training.train()
    return small.weights(training.model), training.progress.positions


def test_a_training_on_preloaded_pairs_is_the_same_to_the_bit(tmp_path):
    (plain, positions), (loaded, theirs) = (end_of_training(tmp_path, preload) for preload in (False, True))
    assert small.bit_equal(plain, loaded) and positions == theirs == {"one": 20, "other": 20}
    assert small.differences(plain, end_of_training(tmp_path, True, seed=1)[0]) > 1e-5


def test_preloading_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr("ipg_hf.pairs.transforms.PRELOAD_CHUNK", 5)
    rows, loaded = (ImageRows(raw_pairs(), processor, PAIR, preload=preload) for preload in (False, True))
    assert torch.equal(pixels(loaded.__getitems__(range(N))), pixels(rows.__getitems__(range(N))))


def kept_files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_preloaded_rows_are_kept_for_the_next_time(tmp_path, monkeypatch):
    settings = {"columns": PAIR, "keep": ("label",), "preload": True, "preload_dir": str(tmp_path / "kept")}
    first = ImageRows(raw_pairs(same=False), processor, **settings)
    (name,) = kept_files(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr("ipg_hf.pairs.transforms.process_images", None)  # nothing is transformed again
        again = ImageRows(raw_pairs(same=False), processor, **settings)
    for ours, theirs in zip(again.__getitems__(range(N)), first.__getitems__(range(N)), strict=True):
        assert ours["label"] == theirs["label"] and all(torch.equal(ours[key], theirs[key]) for key in PAIR.values())
    assert kept_files(tmp_path / "kept") == [name]


@pytest.mark.parametrize("change", ["one image", "order", "processor", "version", "columns"])
def test_what_makes_other_inputs_is_not_read_from_kept_ones(tmp_path, monkeypatch, change):
    settings = {"preload": True, "preload_dir": str(tmp_path)}
    dataset, other, columns = raw_pairs(same=False), processor, dict(PAIR)
    ImageRows(dataset, processor, columns, **settings)
    if change == "one image":
        last = raw_pairs(same=True).select([N - 1])  # of which side a is the same
        dataset = datasets.concatenate_datasets([dataset.select(range(N - 1)), last])
    elif change == "order":
        dataset = dataset.select(range(N)[::-1])
    elif change == "processor":
        other = ViTImageProcessor(**{**processor.to_dict(), "image_mean": [0.4, 0.5, 0.5]})
    elif change == "version":
        monkeypatch.setattr("ipg_hf.pairs.transforms.version", lambda package: "0.0")
    else:
        columns = {"image_a": "pixel_values_b", "image_b": "pixel_values_a"}
    rows = ImageRows(dataset, other, columns, **settings)
    assert len(kept_files(tmp_path)) == 2
    fresh = ImageRows(dataset, other, columns, preload=True)
    ours, theirs = rows.__getitems__(range(N)), fresh.__getitems__(range(N))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in PAIR.values())


def test_an_image_file_that_changed_is_transformed_again(tmp_path):
    path = tmp_path / "image.png"
    dataset = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    shades = []
    for shade in (0, 200):
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)
        os.utime(path, ns=(shade, shade))  # the sizes may agree
        rows = ImageRows(
            dataset, processor, {"image": "pixel_values"}, preload=True, preload_dir=str(tmp_path / "kept")
        )
        shades.append(rows[0]["pixel_values"].mean().item())
    assert shades[1] - shades[0] > 0.5 and len(kept_files(tmp_path / "kept")) == 2


class OwnProcessor(ViTImageProcessor):
    """Its code may change from one start to the next."""


def test_inputs_of_a_processor_of_the_users_own_are_not_kept(tmp_path):
    own = OwnProcessor.from_dict(processor.to_dict())
    ImageRows(raw_pairs(), own, PAIR, preload=True, preload_dir=str(tmp_path))
    assert not kept_files(tmp_path)


@pytest.mark.parametrize("settings", [{"random_flip": True}, {"random_crop_scale": 0.9}])
def test_preload_refuses_random_draws(settings):
    with pytest.raises(ValueError, match="preload=True keeps one version of each image"):
        ImageRows(raw_pairs(), processor, PAIR, preload=True, **settings)


# ---- as_model_inputs ----


def inputs_of(dataset, **kwargs):
    return as_model_inputs(dataset, processor, "pixel_values", keep=("label",), **kwargs)


def test_raw_images_become_inputs():
    for dataset, columns in ((raw_images(), {"pixel_values"}), (raw_pairs(), {*PAIR.values()})):
        rows = inputs_of(dataset, **RANDOM)
        assert isinstance(rows, ImageRows) and {*rows[0]} == {*columns, "label"}
        assert rows.is_random and rows.seed == 5 and rows.random_crop_scale == 0.5 and rows.random_flip


def test_every_other_set_is_left_alone():
    pairs = raw_pairs()
    with_inputs = pairs.map(lambda row, i: {"pixel_values_a": [i], "pixel_values_b": [i]}, with_indices=True)
    for dataset in (
        [{"image": 1}],
        pairs.with_transform(lambda batch: batch),
        with_inputs,
        pairs.remove_columns("image_b"),
        pairs.select_columns("label"),
        pairs.select_columns("label").to_iterable_dataset(),
        with_inputs.to_iterable_dataset(),
        None,
    ):
        assert inputs_of(dataset) is dataset


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow"])
def test_a_format_changes_nothing_of_raw_images(form):
    for dataset in (raw_images(), raw_pairs()):
        plain, formatted = inputs_of(dataset), inputs_of(dataset.with_format(form))
        for ours, theirs in zip(formatted.__getitems__(range(N)), plain.__getitems__(range(N)), strict=True):
            assert ours.keys() == theirs.keys() and ours["label"] == theirs["label"]
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != "label")


def plain_stream(dataset):
    return dataset.to_iterable_dataset(num_shards=2)


def formatted_stream(dataset):
    return plain_stream(dataset).with_format("torch")


def stream_without_features(dataset):
    return datasets.IterableDataset.from_generator(lambda: iter(dataset))


@pytest.mark.parametrize("stream", [plain_stream, formatted_stream, stream_without_features])
@pytest.mark.parametrize("kind", [raw_images, raw_pairs])
def test_streams_equal_rows(stream, kind):
    dataset = kind()
    rows = inputs_of(dataset)
    streamed = list(inputs_of(stream(dataset)))
    assert len(streamed) == N
    for ours, theirs in zip(streamed, rows.__getitems__(range(N)), strict=True):
        assert ours.keys() == theirs.keys() and ours["label"] == theirs["label"]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != "label")


def test_random_streams_share_their_draw_and_repeat_it():
    stream = inputs_of(plain_stream(raw_pairs()), **RANDOM)
    rows = list(stream)
    assert torch.equal(pixels(rows), pixels(rows, "pixel_values_b"))
    assert torch.equal(pixels(list(stream)), pixels(rows))
    plain = pixels(list(inputs_of(plain_stream(raw_pairs()))))
    assert sum(not torch.equal(a, b) for a, b in zip(pixels(rows), plain, strict=True)) > N / 2


def test_sides_of_a_stream_of_different_sizes():
    mixed = raw_pairs(3).map(
        lambda row, i: {"image_b": noise(0, (20, SIDE)) if i == 2 else row["image_b"]}, with_indices=True
    )
    with pytest.raises(ValueError, match=r"must have one size, but they have \[\(16, 16\), \(16, 20\)\] in row 2"):
        list(inputs_of(mixed.to_iterable_dataset()))
