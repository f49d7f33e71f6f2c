# SPDX-License-Identifier: Apache-2.0
"""Training models of every build: adapters, low precision, frozen parts, no labels, averaged, compiled."""

import copy
import math

import numpy as np
import peft
import pytest
import small
import timm
import torch
from datasets import Dataset
from PIL import Image
from small import Around, bit_equal, differences, logged, pairs, rows, trainer, weights
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    ImageGPTConfig,
    ImageGPTForImageClassification,
    ImageGPTImageProcessor,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2ImageProcessor,
    TrainerCallback,
)

from ipg_hf import find_head, load_image_classifier
from ipg_hf.heads import CompiledRun
from ipg_hf.inference import inference

every_distance = pytest.mark.parametrize("distance", small.DISTANCES)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


class NoLabels(nn.Module):
    """A model whose forward takes no labels, around one whose does."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, pixel_values):
        return {"logits": self.inner(pixel_values).logits}


class OwnModule(nn.Module):
    """What users write: any forward that returns a loss and logits, and no config."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * small.SIZE**2, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, images, labels=None):
        logits = self.head(self.body(images).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


# ---- Adapters ----


def lora(save=("classifier",), targets=("q_proj", "v_proj"), **kwargs):
    settings = peft.LoraConfig(r=2, target_modules=list(targets), modules_to_save=list(save), **kwargs)
    torch.manual_seed(0)
    return peft.get_peft_model(small.vit(), settings)


def test_lora_trains_its_adapters_and_its_copy_of_the_head(tmp_path):
    model, around = lora(), Around()
    settings = {"learning_rate": 0.05, "save_strategy": "steps", "save_steps": 2, **small.PAPER}  # which needs the head
    run = trainer(tmp_path, model, callbacks=[around], **settings)
    head = "base_model.model.classifier.modules_to_save.default"
    assert run.head.path == head
    run.train()
    adapters = {name for name, parameter in model.named_parameters() if "lora_" in name}
    # an adapter's A has no gradient while its B is zero
    corrected = moved(around.before[1][0], around.middle[1][0])
    assert corrected == adapters | {f"{head}.weight"}
    assert moved(around.before[0][0], around.after[-1][0]) == adapters | {f"{head}.weight", f"{head}.bias"}
    assert "base_model.model.classifier.original_module.weight" in around.before[0][0]

    run.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(small.vit(), tmp_path / "saved").eval()
    images = torch.stack([row["pixel_values"] for row in rows(4)])
    assert torch.equal(again(pixel_values=images).logits, model.eval()(pixel_values=images).logits)

    resumed = trainer(tmp_path, lora(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bit_equal(weights(resumed.model), weights(model))

    around = Around()
    trainer(tmp_path, lora(), callbacks=[around], learning_rate=0.05, max_steps=2).train()
    # the default distance depends on the bias too
    assert moved(around.before[1][0], around.middle[1][0]) == corrected | {f"{head}.bias"}


def test_a_head_inside_an_adapter_is_refused_where_a_head_is_needed(tmp_path):
    """W z + b lacks the adapter's part, which is zero before training: no comparison of numbers would show it."""
    model = lora(save=(), targets=("classifier",))
    with pytest.raises(
        ValueError, match=r"'base_model\.model\.classifier\.base_layer'.*not the mean.*modules_to_save.*='divergence'"
    ):
        trainer(tmp_path, model)
    before = weights(model)
    run = trainer(tmp_path, model, learning_rate=0.05, **small.DIVERGENCE)
    run.train()
    assert run.head is None and moved(before, weights(model)) == {name for name in before if "lora_" in name}


# ---- Precision ----


@every_distance
def test_a_model_in_bfloat16(tmp_path, distance):
    """The distance is computed in float32 from what the layers gave in bfloat16."""
    model, seen = small.vit().bfloat16(), []
    run = trainer(
        tmp_path,
        model,
        train=rows(24, dtype=torch.bfloat16),
        pair_dataset=pairs(4, dtype=torch.bfloat16),
        max_steps=1,
        learning_rate=0.1,
        check_pairs=False,
        train_sampling_strategy="sequential",
        **small.DISTANCES[distance],
    )
    before = model.classifier.weight.detach().clone()
    hook = model.classifier.register_forward_hook(lambda _, z, logits: seen.append((z[0].detach(), logits.detach())))
    run.train()
    hook.remove()
    # the pair batch of the one step, before the task batch
    z, logits = next((z.float(), logits.float()) for z, logits in reversed(seen[:-1]) if len(z) == 8)
    expected, _ = small.distance_by_hand(distance, before.float(), z, logits)
    (entry,) = logged(run)
    assert math.isclose(entry["ipg/distance"], expected.item(), rel_tol=1e-5 if distance == "paper" else 1e-3)
    assert not torch.equal(model.classifier.weight, before) and model.classifier.weight.dtype == torch.bfloat16


# ---- Frozen parts ----


@every_distance
@pytest.mark.parametrize("part", ["backbone", "head"])
def test_frozen_parts_stay(tmp_path, part, distance):
    """The paper's distance does not depend on the head's bias."""
    model, around = small.vit(), Around()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier") != (part == "head"))
    run = trainer(tmp_path, model, callbacks=[around], learning_rate=0.05, **small.DISTANCES[distance])
    run.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved(around.before[0][0], around.after[-1][0]) == trained
    corrected = moved(around.before[0][0], around.middle[0][0])
    assert corrected == trained - ({"classifier.bias"} if distance == "paper" else set())
    assert all(entry["ipg/distance"] > 0 for entry in logged(run))


# ---- Gradient checkpointing ----


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        model, calls = small.vit().double(), []
        handle = model.vit.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer(
            tmp_path,
            model,
            train=rows(24, dtype=torch.float64),
            pair_dataset=pairs(10, dtype=torch.float64),
            activation_checkpointing=checkpointing,
        ).train()
        handle.remove()
        results.append((weights(model), len(calls)))
    assert differences(results[0][0], results[1][0]) < 1e-12
    assert results[1][1] > results[0][1]  # layers ran once more in the backward pass


# ---- Models that are not of transformers, or take no labels ----


@every_distance
def test_a_module_of_the_users_own(tmp_path, distance):
    def renamed(items, names):
        return [{names.get(key, key): value for key, value in row.items()} for row in items]

    train = renamed(rows(24), {"pixel_values": "images"})
    pair_rows = renamed(pairs(10), {"pixel_values_a": "images_a", "pixel_values_b": "images_b"})
    model = OwnModule()
    settings = {"eval_dataset": train, "learning_rate": 0.01, **small.DISTANCES[distance]}
    run = trainer(tmp_path, model, train=train, pair_dataset=pair_rows, **settings)
    if distance != "divergence":
        assert run.head.path == "head"  # of three linear layers, without a config that tells the number of labels
    before = weights(model)
    run.train()
    assert moved(before, weights(model)) == set(before)
    measured = run.evaluate()
    assert measured["eval_loss"] > 0 and 0 <= run.evaluate_pairs(pair_rows)["eval_flip_rate"] <= 1


@pytest.mark.parametrize(
    ("accumulation", "smoothing", "guided"), [(1, 0.0, True), (3, 0.2, True), (3, 0.0, False), (1, 0.2, False)]
)
def test_a_forward_without_labels_gets_the_same_loss(tmp_path, accumulation, smoothing, guided):
    train = rows(22, dtype=torch.float64)  # the last batch is short
    results = []
    for wrap in (False, True):
        model = small.vit().double()
        run = trainer(
            tmp_path,
            NoLabels(model) if wrap else model,
            train=train,
            eval_dataset=train,
            pair_dataset=pairs(10, dtype=torch.float64) if guided else {},
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=0.01,
            label_smoothing_factor=smoothing,
            **(small.SCALED if guided else {}),
            remove_unused_columns=False,
            compute_metrics=lambda p: {"mean": float(p.predictions.mean()), "labels": float(p.label_ids.sum())},
        )
        run.train()
        assert not guided or min(small.scales(run)) < 1
        results.append((weights(model), run.evaluate()))
    # transformers' label smoother sums in float32
    assert differences(results[0][0], results[1][0]) < (1e-7 if smoothing else 1e-9)
    for name in ("eval_loss", "eval_mean", "eval_labels"):
        assert math.isclose(results[0][1][name], results[1][1][name], rel_tol=1e-6), name


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_a_forward_without_labels_of_another_problem(tmp_path, problem_type):
    labels = {"regression": lambda i: float(i), "multi_label_classification": lambda i: [1.0, float(i % 2)]}
    results = []
    for wrap in (False, True):
        model = small.vit(1 if problem_type == "regression" else 2, problem_type=problem_type).double()
        train = [
            {**row, "labels": torch.tensor(labels[problem_type](i), dtype=torch.float64)}
            for i, row in enumerate(rows(10, dtype=torch.float64))
        ]
        run = trainer(
            tmp_path,
            NoLabels(model) if wrap else model,
            train=train,
            pair_dataset=pairs(10, dtype=torch.float64),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        run.train()
        results.append(weights(model))
    assert differences(*results) < 1e-9


def test_models_of_transformers_whose_forward_takes_no_labels(tmp_path):
    for model, head in (
        (small.lcnet(), "head"),
        (small.deit_with_teacher(), ("cls_classifier", "distillation_classifier")),
    ):
        settings = {"learning_rate": 0.01, "freeze_norm": True, **small.PAPER}  # which needs the head
        run = trainer(tmp_path, model, eval_dataset=rows(6), **settings)
        assert run.head.path == head
        before = weights(model)
        run.train()
        names = (head,) if isinstance(head, str) else head
        assert {f"{name}.weight" for name in names} <= moved(before, weights(model))
        predicted = run.predict(rows(6))
        assert predicted.predictions.shape == (6, 2) and predicted.metrics["test_loss"] > 0
        with torch.no_grad():
            images = torch.stack([row["pixel_values"] for row in rows(6)])
            outputs = model.eval()(pixel_values=images)
        logits = outputs[0] if isinstance(head, str) else outputs.logits
        torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)


# ---- Heads that change: the paper's distance needs them ----


def test_a_head_replaced_after_construction_is_found_anew(tmp_path):
    model = load_image_classifier(timm.create_model("test_resnet", num_classes=2))
    run = trainer(tmp_path, model, freeze_norm=True, learning_rate=0.05, **small.PAPER)
    model.timm_model.reset_classifier(2)
    fresh = model.timm_model.fc
    before = fresh.weight.detach().clone()
    run.train()
    assert run.head.modules == (fresh,) and not torch.equal(fresh.weight, before)


def test_a_head_replaced_during_training_is_an_error(tmp_path):
    class Reset(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.classifier = nn.Linear(32, 2)

    with pytest.raises(RuntimeError, match=r"'classifier' ran 0 times in one forward.*find the head anew"):
        trainer(tmp_path, small.vit(), callbacks=[Reset()], **small.PAPER).train()


def test_a_wrong_head_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"'cls_classifier' is not .*other layers too.*'distillation_classifier'"):
        trainer(tmp_path, small.deit_with_teacher(), head="cls_classifier")
    run = trainer(tmp_path, small.deit_with_teacher(), head=("cls_classifier", "distillation_classifier"))
    assert run.head.kind == "mean of 2 linear"
    with pytest.raises(ValueError, match=r"Did you mean 'classifier'\?"):
        trainer(tmp_path, small.vit(), head="clasifier")


@pytest.mark.parametrize("compiled", [False, True])
def test_averaged_copies_of_the_model(tmp_path, compiled):
    class Average(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.copies = [AveragedModel(model), timm.utils.ModelEmaV3(model, decay=0.5), copy.deepcopy(model)]

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.copies[0].update_parameters(model)
            self.copies[1].update(model)
            if state.global_step == 2:  # hooks of a compiled forward are on the model now
                self.copies.append(copy.deepcopy(model))

    average, model = Average(), small.vit()
    backend = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    run = trainer(tmp_path, model, callbacks=[average], learning_rate=0.05, **small.PAPER, **backend)
    run.train()
    images = {"pixel_values": torch.stack([row["pixel_values"] for row in rows(4)])}
    paths = ("module.classifier", "module.classifier", "classifier", "classifier")
    for averaged, path in zip(average.copies, paths, strict=True):
        head = find_head(averaged)
        assert head.path == path
        head.verify(averaged, images)
        logits, z = head.run(averaged.eval(), images)
        torch.testing.assert_close(logits, z @ head.weight.T + head.bias)
        assert not torch.equal(head.weight, model.classifier.weight)
        hooks = [hook for module in averaged.modules() for hook in module._forward_pre_hooks]
        assert not any(module._forward_hooks for module in averaged.modules())
        assert len(hooks) == (compiled and averaged is average.copies[-1])  # a copy of it, and not of its store
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- Compiled ----


class Graphs(TrainerCallback):
    """The number of compiled graphs after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("build", "backend", "distance"),
    [
        (small.vit, "inductor", "rationale"),
        (small.vit, "aot_eager", "divergence"),
        (small.vit, "aot_eager", "rationale_divergence"),
        (small.resnet, "aot_eager", "rationale_divergence"),
        (small.deit_with_teacher, "aot_eager", "rationale_divergence"),
    ],
    ids=["vit inductor", "vit divergence", "vit", "resnet", "averaged heads"],
)
def test_torch_compile_gives_the_same_numbers(tmp_path, build, backend, distance):
    results, graphs = [], Graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model = build()
        run = trainer(
            tmp_path,
            model,
            train=rows(64),
            eval_dataset=rows(8),
            eval_on_start=True,  # an inference forward before the first step
            max_steps=5,
            freeze_norm=True,
            torch_compile=compiled,
            torch_compile_backend=backend if compiled else None,
            callbacks=[graphs] if compiled else [],
            optim="sgd",  # Adam makes whole steps of gradients that are rounding alone
            learning_rate=0.1,
            invariance_distance=distance,
            **small.SCALED,
        )
        before = weights(model)
        run.train()
        assert differences(before, weights(model)) > 4e-3 and 0 < min(small.scales(run)) < 1
        results.append((weights(model), logged(run)))
    assert differences(results[0][0], results[1][0]) < 1e-5
    for eager, ours in zip(results[0][1], results[1][1], strict=True):
        assert all(
            math.isclose(eager[name], ours[name], rel_tol=1e-4, abs_tol=1e-5)
            for name in eager
            if "ipg/" in name and name != "ipg/pair_wait"
        )
    # the pair forward and the task forward, at the first step; none again
    assert graphs.counts == [2] * 5
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not any(module._forward_hooks for module in model.modules())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings", [{"pair_chunk_size": 2, "gradient_accumulation_steps": 2}, {"bf16": True}], ids=str
)
def test_torch_compile_with_chunks_accumulation_and_bfloat16(tmp_path, settings):
    """On the paper's distance, which takes the head's input out of the graph."""
    results, settings = [], {"train": rows(64), "optim": "sgd", "learning_rate": 0.1, **small.PAPER, **settings}
    torch._dynamo.reset()
    for compiled in (False, True):
        model, graphs = small.vit(), Graphs()
        torch._dynamo.utils.counters.clear()
        backend = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer(tmp_path, model, callbacks=[graphs], **settings, **backend).train()
        results.append(weights(model))
    assert differences(*results) < (1e-2 if "bf16" in settings else 1e-5)
    assert graphs.counts[1] == graphs.counts[-1] > 0
    torch._dynamo.reset()


class TwoWidths(nn.Module):
    """The mean of two heads on features of two widths, as CrossViT returns it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bodies = nn.ModuleList([nn.Linear(3 * small.SIZE**2, width) for width in (4, 6)])
        self.head = nn.ModuleList([nn.Linear(width, 2) for width in (4, 6)])

    def forward(self, pixel_values):
        features = [body(pixel_values.flatten(1)).tanh() for body in self.bodies]
        return {"logits": torch.stack([head(z) for head, z in zip(self.head, features, strict=True)]).mean(0)}


# the transformers models above show it in training
@pytest.mark.parametrize("build", [small.vit, small.timm_resnet, TwoWidths])
def test_the_compiled_pair_forward_is_one_graph(build):
    """Even after the inference forward was compiled without hooks, and for a second run over the same code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build()
    images = {"pixel_values": torch.stack([row["pixel_values"] for row in rows(4)])}
    head = find_head(model, inputs=images)
    with inference(model):
        torch.compile(model, backend="aot_eager")(**images)
        for _ in range(2):
            compiled = CompiledRun(head, backend="aot_eager", fullgraph=True)
            for scale in (1, 2):
                inputs = {"pixel_values": scale * images["pixel_values"]}
                ours, eager = compiled(model, inputs), head.run(model, inputs)
                assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
            compiled.close()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_a_compiled_head_that_does_not_run_is_an_error():
    model = small.vit()
    images = {"pixel_values": torch.stack([row["pixel_values"] for row in rows(4)])}
    compiled = CompiledRun(find_head(model), backend="aot_eager")
    model.classifier = nn.Linear(32, 2)
    with pytest.raises(RuntimeError, match="'classifier' ran 0 times in one forward"):
        compiled(model, images)
    compiled.close()


def test_a_second_compiled_run_finds_the_head_of_its_own_model(tmp_path):
    """Compiled code may be shared between runs: it must read the features of the model that it is called with."""
    torch._dynamo.reset()
    for seed in (1, 2):
        model = small.vit()
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight)
        logs = []
        for compiled in (True, False):
            run = trainer(
                tmp_path,
                copy.deepcopy(model),
                max_steps=2,
                torch_compile=compiled,
                torch_compile_backend="aot_eager" if compiled else None,
                **small.PAPER,
            )
            run.train()
            logs.append([entry["ipg/distance"] for entry in logged(run)])
        assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    torch._dynamo.reset()


# ---- Inputs that are not an image tensor ----


def siglip2():
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**settings, "num_patches": 16, "patch_size": 4}
    torch.manual_seed(0)
    model = Siglip2ForImageClassification(Siglip2Config(vision_config=vision, num_labels=2))
    return model, Siglip2ImageProcessor(patch_size=4, max_num_patches=16)


def imagegpt():
    colours = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3), -1).reshape(-1, 3)
    torch.manual_seed(0)
    model = ImageGPTForImageClassification(
        ImageGPTConfig(
            vocab_size=len(colours) + 1, n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=2, resid_pdrop=0.0
        )
    )
    return model, ImageGPTImageProcessor(clusters=colours, size={"height": 8, "width": 8})


@pytest.mark.parametrize("build", [siglip2, imagegpt])
def test_raw_images_become_whatever_the_model_reads(tmp_path, build):
    model, processor = build()
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(24)]
    train = Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(24)]})
    twins = Dataset.from_dict({"image_a": pictures[:12], "image_b": pictures[12:]})
    run = trainer(
        tmp_path,
        model,
        train=train,
        pair_dataset=twins,
        processing_class=processor,
        learning_rate=0.05,
        max_steps=2,
        **small.PAPER,
    )
    before = weights(model)
    run.train()
    assert f"{run.head.path}.weight" in moved(before, weights(model))
    # the distance of all pairs together, from the processor's own output
    sides = [processor(list(twins[f"image_{side}"]), return_tensors="pt") for side in "ab"]
    with torch.no_grad():
        features = [run.head.run(model.eval(), side)[1].mean(0) for side in sides]
        expected = torch.linalg.svdvals(run.head.weight * (features[0] - features[1]))[0].item()
    assert math.isclose(run.evaluate_pairs(twins)["eval_distance"], expected, rel_tol=1e-4)
    assert run.predict(train).predictions.shape == (24, 2)
