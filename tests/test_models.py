# SPDX-License-Identifier: Apache-2.0
"""`load_image_classifier`: timm modules and saved models become transformers checkpoints."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from small import DIVERGENCE, SIZE, resnet, rows, trainer, vit
from test_heads import LABELS, TIMM, images, timm_module
from torch import nn
from transformers import AutoModelForImageClassification, pipeline
from transformers.modeling_outputs import ImageClassifierOutput

from ipg_hf import find_head, load_image_classifier
from ipg_hf.models import load_trained_classifier, shared_weights


@pytest.mark.parametrize(("name", "kwargs", "path"), TIMM, ids=[row[0] for row in TIMM])
def test_a_wrapped_timm_module_is_an_ordinary_checkpoint(name, kwargs, path, tmp_path):
    module = timm_module(name, **kwargs).eval()
    with torch.no_grad():
        for values in module.buffers():  # as the running statistics of a trained network
            values.add_(0.1 if values.is_floating_point() else 1)
    names = {0: "zero", 1: "one", **{i: f"n{i}" for i in range(2, LABELS)}}
    model = load_image_classifier(module, model_args=kwargs, id2label=names).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    ours = load_image_classifier(tmp_path).eval()
    inputs = images(model, None if name == "resnetv2_18" else 32)
    with torch.no_grad():
        expected = module(inputs["pixel_values"])
        assert expected.std() > 0
        # copied: loaded weights are in unaligned memory, for which kernels round in another order
        assert all(torch.equal(copy.deepcopy(m)(**inputs).logits, expected) for m in (model, again, ours))
    assert again.config.id2label[1] == "one" and again.config.num_labels == LABELS


def test_a_wrapped_timm_module_works_in_a_pipeline(tmp_path):
    model = load_image_classifier(timm_module("test_resnet", num_classes=3)).eval()
    model.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    scores = {row["label"]: row["score"] for row in classify(image, top_k=3)}
    with torch.no_grad():
        expected = model(**classify.image_processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert scores == {f"LABEL_{i}": pytest.approx(p, abs=1e-6) for i, p in enumerate(expected.tolist())}
    assert expected.max() > 0.34


def test_num_labels_replaces_a_timm_head():
    module = timm_module("test_resnet", num_classes=5)
    kept = module.conv1[0].weight.clone()
    model = load_image_classifier(module, num_labels=3)
    assert find_head(model).weight.shape[0] == model.config.num_labels == 3
    assert torch.equal(model.timm_model.conv1[0].weight, kept)
    head = module.fc
    same = load_image_classifier(module, num_labels=3)
    assert same.timm_model.fc is head  # the head has the right width already and is kept


@pytest.mark.parametrize("build", ["vit", "resnet", "timm"])
def test_another_num_labels_gets_a_fresh_initialised_head(build, tmp_path):
    torch.manual_seed(0)
    models = {"vit": vit, "resnet": resnet, "timm": lambda n: load_image_classifier(timm_module("test_resnet", n))}
    saved = models[build](5)
    with torch.no_grad():
        find_head(saved).modules[0].weight.fill_(7.0)
    saved.save_pretrained(tmp_path)
    # freed memory full of NaN, which an uninitialised head would contain
    freed = [torch.full((40, size), float("nan")) for size in (16, 32, 64, 256) for _ in range(50)]
    del freed
    stds = []
    for _ in range(3):
        model = load_image_classifier(tmp_path, num_labels=40)
        head = find_head(model)
        assert head.weight.shape[0] == model.config.num_labels == 40
        assert torch.isfinite(head.weight).all() and torch.isfinite(head.bias).all()
        assert head.bias.abs().max() < 1 and head.weight.mean().abs() < 0.02
        stds.append(head.weight.std().item())
    assert min(stds) > 0.005 and max(stds) < 0.5 and max(stds) < 1.3 * min(stds)
    body = [n for n, _ in saved.named_parameters() if not n.startswith(find_head(saved).path)]
    assert all(torch.equal(model.get_parameter(name), saved.get_parameter(name)) for name in body)
    assert find_head(load_image_classifier(tmp_path, num_labels=5)).weight.eq(7).all()
    assert find_head(load_image_classifier(tmp_path)).weight.eq(7).all()


def test_a_timm_module_with_other_arguments_needs_them_as_model_args():
    module = timm_module("test_vit", img_size=32)
    with pytest.raises(ValueError, match=r"'test_vit'.*pos_embed.*model_args=\{'img_size': 32\}"):
        load_image_classifier(module)
    model = load_image_classifier(module, model_args={"img_size": 32})
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, LABELS)


def test_load_image_classifier_refuses_what_is_no_classifier(tmp_path):
    with pytest.raises(ValueError, match=r"Linear is not a timm image classifier: pass one made by timm\.create_model"):
        load_image_classifier(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="ViTForImageClassification is a transformers model already"):
        load_image_classifier(vit())
    with pytest.raises(OSError):
        load_image_classifier(tmp_path / "nothing")


def damaged(folder, kind):
    """The saved model in a folder with other weights: in a file that cannot be read, of other shapes, or with none."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind in ("pickle", "empty", "archive"):
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        content = (folder / "pytorch_model.bin").read_bytes()
        content = {"pickle": b"\x80\x04xx", "empty": b"", "archive": content[: len(content) // 2]}[kind]
        (folder / "pytorch_model.bin").write_bytes(content)
        weights.unlink()
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "wider":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    elif kind == "text":
        config.write_text('{"model_type": "bert"}')
    elif kind == "backbone":
        save_file({name: value for name, value in load_file(weights).items() if "classifier" not in name}, weights)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("pickle", "are damaged"),
        ("empty", "are damaged"),
        ("archive", "cannot be read"),
        ("cut", "are damaged"),
        ("wider", "have other shapes than its config.json says"),
        ("text", "is no image classifier"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_names_the_folder(tmp_path, kind, match):
    vit().save_pretrained(tmp_path)
    damaged(tmp_path, kind)
    with pytest.raises((ValueError, OSError), match=match) as raised:
        load_image_classifier(tmp_path)
    assert str(tmp_path) in str(raised.value)
    with pytest.raises((ValueError, OSError), match=match):  # of a new head alone other shapes are meant
        load_image_classifier(tmp_path, num_labels=3)
    vit().save_pretrained(tmp_path)
    assert load_image_classifier(tmp_path, num_labels=3).config.num_labels == 3


def test_a_model_is_measured_with_stored_weights_alone(tmp_path):
    vit().save_pretrained(tmp_path)
    assert torch.equal(load_trained_classifier(tmp_path).classifier.weight, vit().classifier.weight)
    damaged(tmp_path, "backbone")
    assert load_image_classifier(tmp_path).config.num_labels == 2  # to fine-tune
    with pytest.raises(ValueError, match=r"lacks 2 of the model's weights, for example classifier\.bias"):
        load_trained_classifier(tmp_path)


def test_weights_of_an_adapter_are_stored_weights(tmp_path):
    base = vit()
    base.base_model.save_pretrained(tmp_path / "base")
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], r=2)
    adapted = get_peft_model(load_image_classifier(tmp_path / "base"), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_trained_classifier(tmp_path / "adapter")
    head = adapted.base_model.model.classifier.modules_to_save["default"].weight
    assert any(torch.equal(value, head) for value in again.parameters())


class View(nn.Module):
    """Two parameters over one memory, as code that ties weights by `.data` makes them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3 * SIZE**2, 2), nn.Linear(3 * SIZE**2, 2)
        self.second.weight = nn.Parameter(self.first.weight.data)

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.first(pixel_values.flatten(1)) + self.second(pixel_values.flatten(1)))


def test_parameters_over_one_memory_are_one_weight(tmp_path):
    model = View()
    assert shared_weights(model) == [["first.weight", "second.weight"]]
    settings = {"eval_dataset": rows(8), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    settings |= DIVERGENCE  # these two layers are no head
    run = trainer(tmp_path, model, save_steps=1, load_best_model_at_end=True, max_steps=2, **settings)
    run.train()  # and loads the best checkpoint, which has the weight once
    assert run.state.best_model_checkpoint
    model.second.weight = nn.Parameter(model.first.weight.data.clone())
    assert shared_weights(model) == []
