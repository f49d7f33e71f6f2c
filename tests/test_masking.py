# SPDX-License-Identifier: Apache-2.0
"""Masks: the cut and the discriminant by hand, discs that a network or a pipeline finds, and what is refused."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small_runs import train

from ipg_hf.cli import main
from ipg_hf.commands import with_rows
from ipg_hf.pairs import add_masks, exchange_pairs
from ipg_hf.pairs.edits import read_mask
from ipg_hf.pairs.masking import (
    LEAST_CELLS,
    _object_of,
    cut,
    discriminant,
    edge_dissimilarity,
    load_segmenter,
)
from ipg_hf.scan import Example, Scan

SIZE = (96, 80)  # width and height


def disc(seed):
    """A patterned disc on a background of another pattern, and where it is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    inside = np.hypot(x - rng.uniform(35, 60), y - rng.uniform(30, 50)) < rng.uniform(14, 24)
    ground = rng.integers(90, 130, 3) + rng.normal(0, 12, (*SIZE[::-1], 3))
    stripes = 160 + 60 * np.sin(x / 2)[..., None] * [1, 0.5, 1] + rng.normal(0, 12, (*SIZE[::-1], 3))
    return Image.fromarray(np.uint8(np.where(inside[..., None], stripes, ground).clip(0, 255))), inside


def discs(number):
    images, masks = zip(*map(disc, range(number)), strict=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x", "y"]))
    rows = {"image": [*images], "label": [number % 2 for number in range(number)]}
    return datasets.Dataset.from_dict(rows, features=features), np.stack(masks)


def overlap(found, wanted):
    """Intersection over union, the mean over images."""
    return np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(found, wanted, strict=True)])


def as_arrays(masks):
    return [np.asarray(mask) > 127 for mask in masks]


def vit(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.Dinov2Config(**sizes, image_size=224, patch_size=14, **changes)
    return transformers.Dinov2Model(config).eval(), transformers.ViTImageProcessor()


# ---- The parts


def test_the_cut_by_hand():
    scores = torch.tensor([[0.0, 1, 9, 10], [5, 1, 1, 1], [3, 3, 3, 3]])
    assert cut(scores).tolist() == [5, 3, 3]


def test_the_dissimilarity_by_hand():
    """3 × 3 cells, one feature vector for the eight edge cells and one at a right angle to it in the middle."""
    cells = torch.zeros(1, 3, 3, 2)
    cells[..., 0] = 1
    cells[0, 1, 1] = torch.tensor([0.0, 1.0])
    cells[0, 0, 0] = torch.tensor([0.6, 0.8])  # of 8 edge cells, the 1 nearest counts, and never a cell itself
    found = edge_dissimilarity(cells)[0]
    assert found[1, 1].item() == pytest.approx(0.2)
    assert found[0, 0].item() == pytest.approx(0.4)
    assert found[2, 2].item() == pytest.approx(0.0)


def test_the_discriminant_finds_the_direction_that_all_objects_share():
    """Each background has a direction of its own; the objects share one, which the edges of their own image tell."""
    rng, cells = np.random.default_rng(0), np.zeros((40, 12, 12, 16), np.float32)
    cells += 0.05 * rng.normal(size=cells.shape)
    for number, image in enumerate(cells):
        image[..., 1 + number % 10] += 1
        image[4:8, 4:8] += 3 * np.eye(16)[0]
    cells = torch.nn.functional.normalize(torch.from_numpy(cells), dim=-1)
    center, direction = discriminant(cells)
    answers = ((cells - center) @ direction) > 0
    assert answers[:, 4:8, 4:8].all() and answers.sum() == 40 * 16
    assert direction.argmax() == 0
    with pytest.raises(ValueError, match="alike"):
        discriminant(torch.ones(2, 12, 12, 16) / 4)


# ---- A model, a pipeline, a function


def test_a_model_finds_the_objects():
    images, wanted = discs(24)
    made = add_masks(images, *vit())
    assert made.column_names == ["image", "label", "mask"] and made["label"][:] == images["label"][:]
    masks = [*made["mask"]]
    assert {(mask.size, mask.mode) for mask in masks} == {(SIZE, "L")}
    assert {*np.unique(masks[0])} == {0, 255}
    assert overlap(as_arrays(masks), wanted) > 0.75
    oval = np.asarray(Image.new("L", SIZE)) > 0
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    oval = np.hypot((x / SIZE[0] - 0.5) / 0.44, (y / SIZE[1] - 0.5) / 0.36) < 1
    assert overlap([oval] * 24, wanted) < 0.6  # the discs are not simply in the middle


def test_maps_of_a_convolutional_network_do_too():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=32, hidden_sizes=[32, 32], depths=[1, 1], layer_type="basic")
    images, wanted = discs(24)
    made = add_masks(images, transformers.ResNetModel(config).eval(), transformers.ViTImageProcessor())
    assert len(made) > 12  # weights at random
    ids = [number for number in range(24) if images[number]["image"] in [*made["image"]]]
    assert overlap(as_arrays(made["mask"]), wanted[ids]) > 0.4


def test_the_masks_are_kept_and_depend_on_weights_and_images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    images, _ = discs(6)
    model, processor = vit()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    first = as_arrays(add_masks(images, model, processor)["mask"])
    del calls[:]
    again = as_arrays(add_masks(images, model, processor)["mask"])
    assert len(calls) == 1  # to find out the size of the map
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    add_masks(images, model, processor, column="object")
    assert len(calls) == 2
    del calls[:]
    add_masks(images.select(range(5)), model, processor)
    assert len(calls) > 1
    with torch.no_grad():
        model.embeddings.cls_token.add_(1)
    del calls[:]
    add_masks(images, model, processor)
    assert len(calls) > 1


def test_pairs_are_made_by_them():
    images, wanted = discs(8)
    rows = iter(wanted)
    made = add_masks(images, lambda image: next(rows))
    pairs = exchange_pairs(made, part="background", soft_edge=0)
    for pair, inside in zip(pairs, wanted, strict=True):
        a, b = (np.asarray(pair[side]).astype(int) for side in ("image_a", "image_b"))
        assert np.array_equal(a[inside], b[inside])
        assert np.abs(a - b)[~inside].mean() > 5


def test_a_function_returns_images_or_arrays():
    images, wanted = discs(3)
    rows = iter(wanted)
    by_image = add_masks(images, lambda image: Image.fromarray(np.uint8(255 * next(rows))), column="object")
    assert all(np.array_equal(a, b) for a, b in zip(as_arrays(by_image["object"]), wanted, strict=True))


def test_the_segments_of_an_object_by_hand():
    """Of 40 × 40 pixels: a square in the middle, one in a corner, all of the frame, a bar from edge to edge."""
    parts = {name: np.zeros((40, 40), bool) for name in ("middle", "corner", "frame", "bar", "dot")}
    parts["middle"][14:26, 14:26] = True
    parts["corner"][:6, :6] = True
    parts["frame"][:] = True
    parts["bar"][8:32] = True  # mostly within the oval, but with 46 of the 156 pixels of the edge
    parts["dot"][18:20, 2:4] = True
    wanted = parts["middle"]
    segments = [{"label": name, "mask": Image.fromarray(np.uint8(255 * part))} for name, part in parts.items()]
    assert np.array_equal(_object_of(segments[:4], (40, 40)), wanted)
    generated = {"masks": [torch.from_numpy(part) for part in parts.values()], "scores": None}
    assert np.array_equal(_object_of(generated, (40, 40)), wanted | parts["dot"])
    assert _object_of(segments[1:4], (40, 40)) is None


def test_the_masks_of_a_pipeline_depend_on_its_options(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    config = transformers.SamConfig(
        vision_config={**small, "image_size": 64, "patch_size": 8, "output_channels": 8, "global_attn_indexes": [0]}
        | {"window_size": 4, "num_pos_feats": 4},
        prompt_encoder_config={"hidden_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
        | {"iou_head_hidden_dim": 8, "iou_head_depth": 2},
    )
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    sizes |= {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    torch.manual_seed(0)
    model, processor = transformers.SamModel(config).eval(), transformers.SamImageProcessor(**sizes)
    for part in (model, transformers.SamProcessor(processor)):
        part.save_pretrained(tmp_path / "sam")
    named, _ = load_segmenter(tmp_path / "sam")
    assert named.task == "mask-generation"
    images, _ = discs(3)

    def found(least):
        options = {"points_per_crop": 4, "pred_iou_thresh": least, "stability_score_thresh": -1.0}
        pipe = transformers.pipeline("mask-generation", model, image_processor=processor, **options)
        return len(add_masks(images, pipe))

    assert found(-100.0) > 0
    with pytest.raises(ValueError, match="no image has a usable mask"):
        found(100.0)


def segformer():
    torch.manual_seed(0)
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [1, 1], "hidden_sizes": [8, 16]}
    sizes |= {"num_attention_heads": [1, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [1, 1]}
    config = transformers.SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=4)
    return transformers.SegformerForSemanticSegmentation(config).eval(), transformers.SegformerImageProcessor(
        size={"height": 32, "width": 32}
    )


def test_a_pipeline_by_object_and_by_name(tmp_path):
    model, processor = segformer()
    found = transformers.pipeline("image-segmentation", model, image_processor=processor)
    images, _ = discs(8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    named, none = load_segmenter(tmp_path)
    assert none is None and named.task == "image-segmentation"
    made = [add_masks(images, one, column=name) for one, name in ((found, "mask"), (named, "object"))]
    assert all(np.array_equal(a, b) for a, b in zip(made[0]["mask"], made[1]["object"], strict=True))
    for image, mask in zip(made[0]["image"], as_arrays(made[0]["mask"]), strict=True):
        segments = [np.asarray(segment["mask"]) > 0 for segment in found(image)]
        parts = [segment for segment in segments if (segment & mask).any()]
        assert np.array_equal(np.logical_or.reduce(parts), mask)  # a segment counts whole, or not at all


def test_a_folder_of_another_model_gives_its_network(tmp_path):
    model, processor = vit()
    classifier = transformers.Dinov2ForImageClassification(model.config)
    classifier.dinov2.load_state_dict(model.state_dict())
    classifier.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, own = load_segmenter(tmp_path)
    assert type(loaded) is transformers.Dinov2Model and own is not None
    pixels = torch.zeros(1, 3, 224, 224)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_a_recipe_and_a_scan_make_masks_by_a_folder(tmp_path, capsys):
    model, processor = vit()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vit")
    pairs = {"maker": "exchange", "part": "background", "segmenter": str(tmp_path / "vit")}
    record, _ = train(tmp_path, pairs=pairs, max_steps=3, eval_steps=3)
    assert record["settings"]["pairs"] == {**pairs, "segmenter": "vit"}  # a record holds no folder of this machine
    assert record["data"]["pair_sets"]["pairs"]["pairs"] <= 300 and "flip_rate" in record["metrics"]["validation"]
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16], depths=[1], layer_type="basic")
    classifier, small = (
        transformers.ResNetForImageClassification(config).eval(),
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    )
    images, _ = discs(40)
    with torch.no_grad():  # each answer for a half of the images
        logits = classifier(small([*images["image"]], return_tensors="pt")["pixel_values"]).logits
        classifier.classifier[1].bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    for part in (classifier, small):
        part.save_pretrained(tmp_path / "model")
    for number, row in enumerate(images):
        (tmp_path / "photos" / "xy"[row["label"]]).mkdir(parents=True, exist_ok=True)
        row["image"].save(tmp_path / "photos" / "xy"[row["label"]] / f"{number}.png")
    command = [
        "scan",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "photos"),
        "--report",
        str(tmp_path / "report"),
    ]
    assert main([*command, "--num_images", "30", "--segmenter", str(tmp_path / "vit")]) == 0
    assert re.search("^background ", capsys.readouterr().out, re.MULTILINE)
    found = json.loads((tmp_path / "report" / "scan.json").read_text())
    assert found["num_images"] <= 30 and found["mask"] == "mask" and found["segmenter"].endswith("vit")
    assert main([*command[:-1], str(tmp_path / "other"), "--segmenter", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err.splitlines()[-1]


def test_a_scan_of_some_rows_names_the_rows_of_the_set():
    image = Image.new("RGB", (4, 4))
    shown = Example(row=1, donor_row=0, image=image, donor=image, edited=image, answer="x", answer_after="y")
    result = with_rows(Scan([], {"border": [shown]}, 2, None, {}, 0), [70, 30])
    assert (result.examples["border"][0].row, result.examples["border"][0].donor_row) == (30, 70)


# ---- What is left out, and refused


def test_rows_without_a_usable_mask_are_left_out_and_counted(caplog):
    images, wanted = discs(5)
    wanted[1] = False
    wanted[3] = True
    rows = iter(wanted)
    made = add_masks(images, lambda image: next(rows))
    assert made["image"][:] == [images[number]["image"] for number in (0, 2, 4)]
    assert "2 of 5 images have no usable mask" in caplog.text
    with pytest.raises(ValueError, match="no image has a usable mask"):
        add_masks(images, lambda image: np.zeros(image.size[::-1], bool))


@pytest.mark.parametrize(
    ("segmenter", "message"),
    [
        (lambda image: np.zeros((3, 4), bool), "array of bool of shape"),
        (lambda image: np.ones(image.size[::-1]), "float64"),
        (lambda image: None, "a NoneType"),
        ("a name", "a str, which finds no objects"),
        (torch.nn.Conv2d(3, 3, 1), "a Conv2d, which finds no objects"),
        (vit()[0], "needs its image processor"),
    ],
)
def test_what_finds_no_objects_is_refused(segmenter, message):
    with pytest.raises(ValueError, match=message):
        add_masks(discs(2)[0], segmenter)


def test_what_cannot_get_masks_is_refused():
    images, _ = discs(2)
    with pytest.raises(ValueError, match="empty"):
        add_masks(images.select([]), lambda image: image)
    detector = transformers.YolosConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=[224, 224]
    )  # its queries, with those of the patches, have a number that looks like a square of cells
    with pytest.raises(ValueError, match="no map of the image"):
        add_masks(images, transformers.YolosModel(detector), transformers.ViTImageProcessor())
    with pytest.raises(ValueError, match="'label' already"):
        add_masks(images, lambda image: image, column="label")
    with pytest.raises(ValueError, match="the source"):
        add_masks(images.to_iterable_dataset(), lambda image: image)
    coarse = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=16
    )
    with pytest.raises(ValueError, match=f"{LEAST_CELLS}×{LEAST_CELLS}.*32 pixels: 2×2 cells"):
        add_masks(images, transformers.ViTModel(coarse), transformers.ViTImageProcessor())


def test_masks_are_what_readers_of_masks_take():
    made = add_masks(discs(6)[0], *vit())
    mask = read_mask(made[0]["mask"], "the mask", "L", made[0]["image"])
    assert np.array_equal(mask, made[0]["mask"])
