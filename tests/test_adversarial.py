# SPDX-License-Identifier: Apache-2.0
"""Adversarial pairs: the augmentations, the search, and trainings that search partners at each step."""

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image
from small import bit_equal, differences, logged, trainer, weights
from transformers import ViTImageProcessor

from ipg_hf.guidance import invariance_divergence
from ipg_hf.pairs import AdversarialPairs
from ipg_hf.pairs.adversarial import STRENGTHS, augmented, search_partners

ALONE = {name: dict.fromkeys(STRENGTHS, 0.0) | {name: 0.4} for name in STRENGTHS}


def pixels(n=4, dtype=torch.float64):
    return torch.stack([row["pixel_values"] for row in small.images(n, dtype=dtype)])


def searched(model, images, keys=None, **settings):
    keys = keys or [(0, number) for number in range(len(images))]
    return search_partners(
        model,
        images,
        "pixel_values",
        AdversarialPairs([], **settings),
        normalisation=((0.0,), (1.0,)),
        keys=keys,
        problem_type="single_label_classification",
    )


def divergence(model, a, b):
    model.eval()
    with torch.no_grad():
        return invariance_divergence(model(a).logits, model(b).logits).item()


# ---- The augmentations ----


def test_each_augmentation_by_hand():
    image = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 8, 8)

    def changed(name, values):
        settings = AdversarialPairs([], **ALONE[name])
        return augmented(image, {name: torch.as_tensor(values, dtype=torch.float64)}, settings)[0, :, 3, 3].tolist()

    mix = torch.zeros(1, 3, 3)
    mix[0, 0, 2] = 0.5  # a fifth of the blue is added to the red: .2 + .4 · .5 · .6
    assert changed("color", mix) == pytest.approx([0.32, 0.4, 0.6])
    assert changed("contrast", [0.5]) == pytest.approx([0.16, 0.4, 0.64])  # around the mean, .4
    assert changed("brightness", [-1.0]) == pytest.approx([0.0, 0.0, 0.2])  # clipped at black
    assert changed("blur", [1.0]) == pytest.approx([0.2, 0.4, 0.6])  # blur does not change a uniform image
    assert changed("noise", torch.full((1, 3, 8, 8), 0.25)) == pytest.approx([0.3, 0.5, 0.7])


def test_blur_mixes_the_image_with_its_blurred_version():
    image = pixels(1)
    none, half, all_of_it = (
        augmented(
            image, {"blur": torch.tensor([value]).double()}, AdversarialPairs([], **(ALONE["blur"] | {"blur": 1.0}))
        )
        for value in (-1.0, 0.0, 1.0)
    )
    assert torch.equal(none, image)
    assert torch.allclose(half, (image + all_of_it) / 2)
    assert all_of_it.var() < 0.2 * image.var()
    assert all_of_it.mean().item() == pytest.approx(image.mean().item(), abs=0.02)


# ---- The search ----


@pytest.mark.parametrize("name", [*STRENGTHS, "all"])
def test_the_search_raises_the_divergence_within_the_strengths(name):
    model, images = small.vit().double(), pixels()
    settings = ALONE[name] if name != "all" else {}
    found = [divergence(model, images, searched(model, images, steps=steps, **settings)) for steps in (1, 10)]
    random = divergence(model, images, searched(model, images, steps=1, step_size=1e-9, **settings))
    assert found[1] > random
    assert found[1] >= 0.9 * found[0]
    if name == "noise":
        assert (searched(model, images, steps=5, **settings) - images).abs().max() <= 0.4 + 1e-12


def test_a_partner_depends_on_its_own_image_and_key_alone():
    model, images = small.vit(dropout=0.5).double().train(), pixels()
    together = searched(model, images)
    assert model.training and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    for number in range(len(images)):
        alone = searched(model, images[number : number + 1], keys=[(0, number)])
        assert torch.allclose(alone, together[number : number + 1], atol=1e-12)
    other = searched(model, images, keys=[(1, number) for number in range(len(images))])
    assert (other - together).abs().max() > 1e-3
    assert torch.equal(searched(model, images), together)


def test_the_augmentations_act_on_pixels_under_any_normalisation():
    model, images = small.vit().double(), pixels()
    mean, std = (
        torch.tensor([0.4, 0.5, 0.6]).double().view(3, 1, 1),
        torch.tensor([0.2, 0.3, 0.1]).double().view(3, 1, 1),
    )

    class Normalised(torch.nn.Module):
        """The same function of the pixels, for normalised inputs."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, pixel_values):
            return self.inner(pixel_values * std + mean)

    found = search_partners(
        Normalised(),
        (images - mean) / std,
        "pixel_values",
        AdversarialPairs([]),
        normalisation=([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]),
        keys=[(0, number) for number in range(4)],
        problem_type="single_label_classification",
    )
    assert torch.allclose(found * std + mean, searched(model, images), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps=0 is not valid"),
        ({"every": 0}, "every=0 is not valid"),
        ({"blur": 1.5}, "blur=1.5 is not valid"),
        (dict.fromkeys(STRENGTHS, 0), "nothing to search over"),
    ],
)
def test_adversarial_pairs_refuse_settings_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        AdversarialPairs([], **settings)


def test_adversarial_pairs_refuse_streams_and_inputs_that_are_no_images(tmp_path):
    stream = datasets.Dataset.from_dict({"x": [1]}).to_iterable_dataset()
    for wrong in (stream, datasets.DatasetDict(train=datasets.Dataset.from_dict({"x": [1]}))):
        with pytest.raises(ValueError, match=f"need a map-style set of images, not {type(wrong).__name__}"):
            AdversarialPairs(wrong)
    with pytest.raises(ValueError, match="not in \\[0, 1\\] before normalisation"):
        run(tmp_path, AdversarialPairs(small.rows(8)))
    with pytest.raises(ValueError, match="must have pixel_values"):
        run(tmp_path, AdversarialPairs([{"labels": 1}] * 8))


# ---- Trainings ----


def run(folder, pair_dataset=None, build=small.vit, **kwargs):
    resume = kwargs.pop("resume", None)
    pair_dataset = AdversarialPairs(small.images(16)) if pair_dataset is None else pair_dataset
    training = trainer(folder, build(), small.images(16), pair_dataset, learning_rate=0.01, **kwargs)
    training.train(resume_from_checkpoint=resume)
    return training


def test_a_training_logs_what_the_search_costs(tmp_path):
    training = run(tmp_path, AdversarialPairs(small.images(16), steps=2))
    for entry in logged(training):
        assert entry["ipg/adversarial_images"] == 4 * 3
        assert 0 < entry["ipg/adversarial_seconds"] < 60
        assert entry["ipg/divergence"] > 0
    kept = run(tmp_path, AdversarialPairs(small.images(16), steps=2, every=3), logging_steps=3)
    assert logged(kept)[0]["ipg/adversarial_images"] == pytest.approx(4)
    assert kept.progress.positions == {"pairs": 4}
    settings = {"correction_interval": 2, "logging_steps": 2, "max_steps": 4}
    seldom = run(tmp_path, AdversarialPairs(small.images(16), steps=2), **settings)
    assert [entry["ipg/adversarial_images"] for entry in logged(seldom)] == [6, 6]
    named = run(tmp_path, {"any": AdversarialPairs(small.images(16)), "frame": small.pairs(8)})
    assert {"ipg/any/adversarial_images", "ipg/any/divergence", "ipg/frame/distance"} <= logged(named)[0].keys()


def test_the_partners_change_the_training(tmp_path):
    """Two runs are equal to the last bit. A run with another strength differs."""
    plain = weights(run(tmp_path).model)
    assert differences(plain, weights(run(tmp_path, AdversarialPairs(small.images(16), color=0.1)).model)) > 1e-6
    assert bit_equal(plain, weights(run(tmp_path).model))


@pytest.mark.parametrize("build", [small.vit, small.timm_resnet, small.deit_with_teacher, small.levit_with_teacher])
def test_a_chunked_search_equals_the_whole_search(tmp_path, build):
    results = []
    for chunk in (None, 3):
        model = build().double()
        source = AdversarialPairs(small.images(16, dtype=torch.float64))
        trainer(
            tmp_path,
            model,
            small.images(16, dtype=torch.float64),
            source,
            pair_chunk_size=chunk,
            freeze_norm=True,
            optim="sgd",
            learning_rate=0.1,
        ).train()
        results.append(weights(model))
    assert differences(*results) < 1e-9


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_uses_the_kept_partners_again(tmp_path, every):
    def settings():
        return {
            "pair_dataset": AdversarialPairs(small.images(16), every=every),
            "max_steps": 7,
            "save_strategy": "steps",
            "save_steps": 2,
        }

    whole = run(tmp_path / "whole", **settings())
    assert (tmp_path / "whole/checkpoint-4/adversarial_pairs_0.safetensors").exists() is (every == 3)
    resumed = run(tmp_path / "resumed", **settings(), resume=str(tmp_path / "whole/checkpoint-4"))
    assert bit_equal(weights(whole.model), weights(resumed.model))
    seconds = {"ipg/adversarial_seconds", "ipg/pair_wait"}
    for ours, theirs in zip(logged(whole)[4:], logged(resumed)[-3:], strict=True):
        assert {k: v for k, v in ours.items() if k not in seconds} == {
            k: v for k, v in theirs.items() if k not in seconds
        }
    if every == 3:  # negative control: without the kept pairs the training differs
        (tmp_path / "whole/checkpoint-4/adversarial_pairs_0.safetensors").unlink()
        again = run(tmp_path / "again", **settings(), resume=str(tmp_path / "whole/checkpoint-4"))
        assert not bit_equal(weights(whole.model), weights(again.model))


@pytest.mark.parametrize("precision", ["bf16", "torch_compile"])
def test_adversarial_pairs_train_in_bf16_and_compiled(tmp_path, precision):
    # without noise and Adam: both use the sign of a gradient, which turns rounding errors into whole steps
    settings = {"pair_dataset": AdversarialPairs(small.images(16), noise=0), "optim": "sgd"}
    expected = run(tmp_path, **settings)
    ours = run(tmp_path, **settings, **{precision: True})
    limit = 1e-5 if precision == "torch_compile" else 1e-2
    assert differences(weights(expected.model), weights(ours.model)) < limit
    assert logged(ours)[0]["ipg/divergence"] == pytest.approx(logged(expected)[0]["ipg/divergence"], rel=0.5)


def test_adversarial_pairs_take_raw_images_with_and_without_normalisation(tmp_path):
    rng = np.random.default_rng(0)
    raw = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(12)],
            "label": [0, 1] * 6,
        }
    )
    size = {"height": small.SIZE, "width": small.SIZE}
    for processor in (ViTImageProcessor(size=size), ViTImageProcessor(size=size, do_normalize=False)):
        training = trainer(
            tmp_path,
            small.vit(),
            raw,
            AdversarialPairs(raw),
            processing_class=processor,
            random_flip=True,
            random_crop_scale=0.5,
        )
        training.train()
        assert logged(training)[0]["ipg/divergence"] > 0
