# SPDX-License-Identifier: Apache-2.0
"""Generated pairs: orientation, an interrupted run, the filters by hand, and pipelines of diffusers as editors."""

import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageClassification, ResNetConfig, ViTImageProcessor

from ipg_hf.pairs import check_pairs, generate_pairs, label_classifier, label_neighbors

LOGGER = "ipg_hf.pairs.generating"


def flat(level, size=(4, 4)):
    return Image.new("RGB", size, (level,) * 3)


def levels(image):
    return int(np.asarray(image)[0, 0, 0])


def source(*rows, names=("dark", "light"), **more):
    """Grey images: their level, their label, and whether they are above 100."""
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["x", "y"]),
        shade=datasets.ClassLabel(names=list(names)),
        **{name: datasets.Value("string") for name in more},
    )
    made = {"image": [flat(level) for level, _ in rows], "label": [label for _, label in rows]}
    made["shade"] = [int(level > 100) for level, _ in rows]
    return datasets.Dataset.from_dict({**made, **more}, features=features)


ROWS = ((10, 0), (20, 1), (200, 0), (210, 1))


def invert(images, values, seeds):
    return [ImageOps.invert(image) for image in images]


class Recorded:
    """An editor that remembers its calls, and fails at the call with the given number."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def __call__(self, images, values, seeds):
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(([levels(image) for image in images], list(values), list(seeds)))
        return [flat(100 + seed % 100) for seed in seeds]


def stored(pairs):
    return [(levels(row["image_a"]), levels(row["image_b"]), row["source_id"]) for row in pairs]


def test_an_image_and_its_edit_make_a_pair(tmp_path):
    pairs = generate_pairs(source(*ROWS), invert, tmp_path / "edits")
    assert stored(pairs) == [(10, 245, 0), (20, 235, 1), (200, 55, 2), (210, 45, 3)]
    assert pairs["label"][:] == [0, 1, 0, 1] and pairs.features["label"].names == ["x", "y"]
    assert pairs.features["attribute_a"].names == ["original", "edited"]
    assert {*pairs["attribute_a"][:]} == {0} and {*pairs["attribute_b"][:]} == {1}
    np.testing.assert_allclose(pairs["change"][:], np.array([235, 215, 145, 165]) / 255)
    assert len([*(tmp_path / "edits").glob("*.png")]) == 4


def test_with_an_attribute_each_image_is_edited_to_the_other_value(tmp_path):
    editor = Recorded()
    asked = generate_pairs(source(*ROWS), editor, tmp_path / "one", attribute="shade", min_change=0)
    assert [call[1] for call in editor.calls] == [["light", "light", "dark", "dark"]]
    assert asked.features["attribute_a"].names == ["dark", "light"]
    pairs = generate_pairs(source(*ROWS), invert, tmp_path / "two", attribute="shade")
    # the first value on side a, whichever image is the edited one
    assert stored(pairs) == [(10, 245, 0), (20, 235, 1), (55, 200, 2), (45, 210, 3)]
    assert {*pairs["attribute_a"][:]} == {0} and {*pairs["attribute_b"][:]} == {1}
    assert not [finding for finding in check_pairs(pairs) if finding.severity == "error"]


def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path):
    whole, first, second = Recorded(), Recorded(fails_at=1), Recorded()
    settings = {"attribute": "shade", "min_change": 0, "seed": 3}
    expected = generate_pairs(source(*ROWS), whole, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        generate_pairs(source(*ROWS), first, tmp_path / "parts", batch_size=2, **settings)
    pairs = generate_pairs(source(*ROWS), second, tmp_path / "parts", batch_size=1, **settings)
    assert [call[0] for call in first.calls] == [[10, 20]] and [call[0] for call in second.calls] == [[200], [210]]
    assert stored(pairs) == stored(expected)
    again = Recorded()
    assert stored(generate_pairs(source(*ROWS), again, tmp_path / "parts", **settings)) == stored(expected)
    assert not again.calls
    next((tmp_path / "parts").glob("*.png")).unlink()  # a deleted edit is made again, alone
    assert stored(generate_pairs(source(*ROWS), again, tmp_path / "parts", **settings)) == stored(expected)
    assert [len(call[0]) for call in again.calls] == [1]
    other = Recorded()
    generate_pairs(source(*ROWS), other, tmp_path / "other", **(settings | {"seed": 4}))
    assert not {*other.calls[0][2]} & {*whole.calls[0][2]}


def test_fewer_pairs_are_a_subset_whose_edits_are_used_again(tmp_path):
    editor = Recorded()
    few = generate_pairs(source(*ROWS), editor, tmp_path, num_pairs=2, min_change=0)
    more = generate_pairs(source(*ROWS), editor, tmp_path, num_pairs=3, min_change=0)
    assert {*stored(few)} < {*stored(more)} and [len(call[0]) for call in editor.calls] == [2, 1]


def test_edits_that_change_too_little_make_no_pair(tmp_path, caplog):
    def editor(images, values, seeds):
        return [flat(levels(image) + step) for image, step in zip(images, (0, 2, 3, 50), strict=True)]

    with caplog.at_level(logging.WARNING, LOGGER):
        pairs = generate_pairs(source(*ROWS), editor, tmp_path)
    assert pairs["source_id"][:] == [2, 3]  # 3 / 255 is above 0.01, 2 / 255 below
    assert "2 of 4 edits make no pair: 2 change their image by less than min_change=0.01" in caplog.text
    # an equal image is no pair at any threshold
    assert generate_pairs(source(*ROWS), editor, tmp_path, min_change=0)["source_id"][:] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"4 of 4 edits make no pair.*improve the editor, or lower the threshold"):
        generate_pairs(source(*ROWS), editor, tmp_path, min_change=0.5)


def test_edits_of_another_label_make_no_pair(tmp_path, caplog):
    # the probability of the label y is the edit's level
    def classify(images):
        y = np.array([levels(image) / 255 for image in images])
        return np.stack([1 - y, y], 1)

    with caplog.at_level(logging.WARNING, LOGGER):
        pairs = generate_pairs(source(*ROWS), invert, tmp_path, classify=classify, batch_size=3)
    # edits 245 (x), 235 (y), 55 (x), 45 (y): the first and the last look like the other label
    assert pairs["source_id"][:] == [1, 2]
    np.testing.assert_allclose(pairs["probability"][:], [235 / 255, 200 / 255])
    assert "2 have a lower probability of the label than min_probability=0.5" in caplog.text
    strict = generate_pairs(source(*ROWS), invert, tmp_path, classify=classify, min_probability=0.9)
    assert strict["source_id"][:] == [1]
    assert len(generate_pairs(source(*ROWS), invert, tmp_path)) == 4  # no filter


def test_edits_get_the_size_and_mode_of_their_images(tmp_path):
    images = [flat(10, (6, 4)), flat(20), flat(200).convert("L"), flat(210).convert("RGBA")]
    rows = datasets.Dataset.from_dict({"image": images})
    pairs = generate_pairs(rows, lambda images, *_: [flat(99, (9, 9)).convert("L") for _ in images], tmp_path)
    for row in pairs:
        assert row["image_a"].size == row["image_b"].size and row["image_a"].mode == row["image_b"].mode == "RGB"
    assert pairs[0]["image_b"].size == (6, 4)


def network(classes=2):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=classes)
    return AutoModelForImageClassification.from_config(config).eval()


PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def test_the_probabilities_of_a_classifier_are_those_of_its_logits():
    model, images = network(3), [flat(30), flat(220)]
    model.config.id2label = {0: "y", 1: "z", 2: "x"}
    found = label_classifier(model, PROCESSOR, source(*ROWS))(images)
    with torch.no_grad():
        logits = model(**PROCESSOR(images, return_tensors="pt")).logits
    # the labels are x and y, by name: the model has them in another order
    np.testing.assert_allclose(found, logits.double().softmax(-1)[:, [2, 0]], rtol=1e-6)
    assert found.shape == (2, 2) and found.dtype == np.float64
    model.config.id2label = {0: "y", 1: "z", 2: "w"}
    with pytest.raises(ValueError, match="but not the data's"):
        label_classifier(model, PROCESSOR, source(*ROWS))


def test_neighbours_vote_by_their_labels():
    known = source((10, 0), (12, 0), (14, 1), (200, 1), (205, 1), (210, 0))
    model = network()
    classify = label_neighbors(model, PROCESSOR, known, num_neighbors=3)
    np.testing.assert_allclose(classify([flat(11), flat(206)]), [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    np.testing.assert_allclose(label_neighbors(model, PROCESSOR, known, num_neighbors=1)([flat(210)]), [[1, 0]])
    with pytest.raises(ValueError, match="num_neighbors=7"):
        label_neighbors(model, PROCESSOR, known, num_neighbors=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": [{"image": flat(1)}]}, "must be a datasets.Dataset"),
        ({"attribute": "gender"}, "no column 'gender'"),
        ({"min_change": -1}, "min_change=-1"),
        ({"min_probability": 50}, "min_probability=50"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_pairs": 9}, "num_pairs=9"),
        ({"editor": lambda images, *_: images[:1]}, "returned 1 images for 4"),
        ({"editor": lambda images, *_: np.zeros((4, 4, 4, 3))}, "returned a ndarray"),
        ({"editor": lambda images, *_: ["a"] * 4}, "returned a list of str"),
        ({"classify": lambda images: np.zeros(len(images))}, r"shape \(4,\).*\(4, 2\)"),
        ({"classify": lambda images: np.zeros((len(images), 1000))}, r"shape \(4, 1000\).*\(4, 2\)"),
        ({"classify": lambda images: np.full((len(images), 2), 3.0)}, "Logits need a softmax"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, settings, message):
    given = {"source": source(*ROWS), "editor": invert, "folder": tmp_path} | settings
    with pytest.raises(ValueError, match=message):
        generate_pairs(given.pop("source"), given.pop("editor"), given.pop("folder"), **given)


def test_a_filter_needs_labels(tmp_path):
    with pytest.raises(ValueError, match="no column 'label'"):
        generate_pairs(source(*ROWS).remove_columns("label"), invert, tmp_path, classify=lambda images: None)
    assert "label" not in generate_pairs(source(*ROWS).remove_columns("label"), invert, tmp_path).column_names


def test_a_third_value_of_the_attribute_is_refused(tmp_path):
    rows = source(*ROWS, names=("dark", "light", "grey"))
    rows = rows.map(lambda row, n: {"shade": 2 if n == 1 else row["shade"]}, with_indices=True)
    with pytest.raises(ValueError, match="row 1: shade=2 is none of the two values"):
        generate_pairs(rows, invert, tmp_path, attribute="shade")


def test_edits_belong_to_image_value_and_seed(tmp_path, caplog):
    """A folder serves other sets too: an edit is made again only if its image, value or seed is another one."""
    editor = Recorded()
    settings = {"min_change": 0, "attribute": "shade"}
    generate_pairs(source(*ROWS), editor, tmp_path, **settings)
    with caplog.at_level(logging.WARNING, LOGGER):
        more = generate_pairs(source((33, 0), *reversed(ROWS)), editor, tmp_path, **settings)
    assert "4 of 5 edits are taken from" in caplog.text
    assert [call[0] for call in editor.calls] == [[10, 20, 200, 210], [33]] and len(more) == 5
    turned = source(*ROWS, names=("light", "dark"))  # each image is to become another value now
    generate_pairs(turned, editor, tmp_path, **settings)
    generate_pairs(source(*ROWS), editor, tmp_path, seed=1, **settings)
    generate_pairs(source(*ROWS), editor, tmp_path, min_change=0)
    assert [len(call[0]) for call in editor.calls] == [4, 1, 4, 4, 4]


def test_a_folder_of_photographs_is_left_alone(tmp_path):
    flat(3).save(tmp_path / "0000000.png")
    generate_pairs(source(*ROWS), invert, tmp_path)
    assert levels(Image.open(tmp_path / "0000000.png")) == 3
    with pytest.raises(NotADirectoryError, match=r"0000000\.png is a file"):
        generate_pairs(source(*ROWS), invert, tmp_path / "0000000.png")


def test_finished_edits_are_read_where_nothing_can_be_written(tmp_path):
    pairs = generate_pairs(source(*ROWS), invert, tmp_path)
    (tmp_path / "edits.lock").unlink()
    again = generate_pairs(source(*ROWS), Recorded(fails_at=0), tmp_path)
    assert stored(again) == stored(pairs) and not (tmp_path / "edits.lock").exists()


def test_a_changed_edit_must_fit_its_image(tmp_path):
    generate_pairs(source(ROWS[0]), invert, tmp_path)
    edit = next(tmp_path.glob("*.png"))
    flat(77).save(edit)  # mended by hand
    assert stored(generate_pairs(source(ROWS[0]), invert, tmp_path)) == [(10, 77, 0)]
    for size in ((9, 5), (1, 1)):
        flat(77, size).save(edit)
        with pytest.raises(ValueError, match=rf"edit of row 0 .*{size[0]}×{size[1]} pixels and its image 4×4"):
            generate_pairs(source(ROWS[0]), invert, tmp_path)
    edit.write_bytes(b"no image")
    with pytest.raises(ValueError, match="If you delete the file, the edit is made again"):
        generate_pairs(source(ROWS[0]), invert, tmp_path)


def test_the_editor_gets_truth_values_and_texts_as_they_are(tmp_path):
    for number, values in enumerate(([False, True], ["no", "yes"], [0, 1])):
        rows = datasets.Dataset.from_dict({"image": [flat(10), flat(200)], "shade": values})
        editor = Recorded()
        generate_pairs(rows, editor, tmp_path / str(number), attribute="shade", min_change=0)
        assert editor.calls[0][1] == values[::-1] and type(editor.calls[0][1][0]) is type(values[0])
    with pytest.raises(ValueError, match="'shade' has the one value"):
        one = source(ROWS[0]).cast_column("shade", datasets.ClassLabel(names=["dark"]))
        generate_pairs(one, invert, tmp_path / "one", attribute="shade")


def test_labels_that_are_no_classes_are_refused_before_the_first_edit(tmp_path):
    def classify(images):
        return np.full((len(images), 2), 0.5)

    editor = Recorded()
    for labels, message in (
        (["x", "y"], "row 0 is no class"),
        ([0.5, 1.0], "row 0 is no class"),
        ([1, -1], "row 1 is no class"),
        ([0, None], "row 1 of the source has no label"),
    ):
        rows = datasets.Dataset.from_dict({"image": [flat(10), flat(200)], "label": labels})
        with pytest.raises(ValueError, match=message):
            generate_pairs(rows, editor, tmp_path, classify=classify)
    assert not editor.calls


@pytest.mark.parametrize("deep", [np.full((4, 4), 500, np.uint16), np.full((4, 4), 0.5, np.float32)])
def test_edits_of_more_than_8_bits_are_refused(tmp_path, deep):
    with pytest.raises(ValueError, match="the edit of row 0 has the mode"):
        generate_pairs(source(*ROWS), lambda images, *_: [Image.fromarray(deep) for _ in images], tmp_path)


def pipeline():
    """A small InstructPix2Pix pipeline with random weights."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 16
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    made = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, **tokens, max_position_embeddings=16)),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=8,
            in_channels=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_a_pipeline_of_diffusers_edits(tmp_path):
    pipe = pipeline()

    def editor(images, values, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = [f"make it {value}" for value in values]
        return pipe(prompt=prompts, image=images, num_inference_steps=2, generator=generators).images

    rows = datasets.Dataset.from_dict(
        {"image": [flat(level, (16, 16)) for level, _ in ROWS], "shade": ["dark", "dark", "light", "light"]}
    )
    pairs = generate_pairs(rows, editor, tmp_path / "four", attribute="shade", batch_size=4)
    one_by_one = generate_pairs(rows, editor, tmp_path / "one", attribute="shade", batch_size=1)
    sides = ("image_b", "image_b", "image_a", "image_a")  # the edited ones
    for row, other, side in zip(pairs, one_by_one, sides, strict=True):
        edits = np.asarray(row[side], int), np.asarray(other[side], int)
        assert edits[0].shape == (16, 16, 3) and edits[0].std() > 0
        assert np.abs(edits[0] - edits[1]).max() <= 1  # by the seed of each image, whatever the batch
    originals = [row["image_a" if side == "image_b" else "image_b"] for row, side in zip(pairs, sides, strict=True)]
    assert [levels(image) for image in originals] == [level for level, _ in ROWS]
