# SPDX-License-Identifier: Apache-2.0
"""What a training leaves to be published: adapters, several evaluation sets, any names, any image size, any module."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import peft
import pytest
import small
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel, TimmWrapperImageProcessor, ViTConfig, ViTImageProcessor, pipeline
from transformers.modeling_outputs import ImageClassifierOutput

from ipg_hf import load_image_classifier
from ipg_hf.hub.card import model_card
from ipg_hf.hub.publish import PushError
from ipg_hf.metrics import GroupMetrics, group_name, group_parts
from ipg_hf.record import json_values
from ipg_hf.report import group_table

PROCESSOR = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})


def card_of(run):
    run.create_model_card()
    return (Path(run.args.output_dir) / "README.md").read_text()


# ---- Adapters ----


def adapter(folder):
    base = folder / "base"
    small.vit(3).save_pretrained(base)
    model = load_image_classifier(str(base), num_labels=2, id2label={0: "cat", 1: "dog"})
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))


def test_the_card_of_an_adapter_is_ours_and_its_code_loads_the_model(tmp_path):
    run = small.trainer(
        tmp_path / "out", adapter(tmp_path), processing_class=PROCESSOR, save_strategy="steps", save_steps=2
    )
    run.train()
    run.save_model()
    assert not [*(tmp_path / "out").rglob("README.md")]  # PEFT's template
    card = card_of(run)
    assert "Written by ipg_hf" in card and "More Information Needed" not in card and str(tmp_path) not in card
    assert ModelCard(card).data.library_name == "peft"
    run.save_model()  # PEFT would write the local path of the base model into the card
    assert (tmp_path / "out" / "README.md").read_text() == card
    code = re.search(r"```python\n([\s\S]*?)```", card.split("## How to use")[1])[1]
    code = code.replace("<your-name>/out", str(tmp_path / "out")).replace("<base model>", str(tmp_path / "base"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    names = {}
    exec(code.replace("image.png", str(tmp_path / "image.png")), names)
    answers = {answer["label"]: answer["score"] for answer in names["classify"](image)}
    with torch.no_grad():
        scores = run.model.eval()(**PROCESSOR(image, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert answers == pytest.approx({"cat": scores[0], "dog": scores[1]}, abs=1e-5)


def test_a_text_of_the_users_own_is_kept_beside_an_adapter(tmp_path):
    run = small.trainer(tmp_path / "out", adapter(tmp_path))
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text("mine")
    run.save_model()
    assert card_of(run) == "mine"


@pytest.mark.parametrize("base", ["a folder", "someone/base"])
def test_who_pushes_an_adapter_hears_whether_others_can_load_it(tmp_path, caplog, base):
    model = adapter(tmp_path)
    if base != "a folder":
        model.peft_config["default"].base_model_name_or_path = base
    run = small.trainer(tmp_path / "out", model)
    with pytest.raises(PushError):  # there is no Hub
        run.push_to_hub()
    said = [record.getMessage() for record in caplog.records if "adapter_config.json" in record.getMessage()]
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    card = card_of(run)
    if base == "a folder":
        assert named == str(tmp_path / "base") and len(said) == 1 and named in said[0]
        assert "peft_config['default'].base_model_name_or_path" in said[0] and "<base model>" in card
    else:
        assert named == base == ModelCard(card).data.base_model and said == [] and f'    "{base}", config' in card


# ---- Several evaluation sets ----


def test_every_evaluation_set_is_in_the_card(tmp_path):
    sets = {
        "iid": small.rows(8, attribute=True),
        "ood": small.rows(12, seed=3, attribute=True),
        "ood_far": small.rows(4),
    }
    run = small.trainer(tmp_path, eval_dataset=sets, compute_metrics=GroupMetrics())
    assert "This model has not been evaluated." in card_of(run)
    run.train()
    measured = run.evaluate()
    card = card_of(run)
    assert "Measured on the iid, ood, ood_far sets" in card and "has not been evaluated" not in card
    for name in sets:
        part = card.split(f"### {name}\n")[1].split("##")[0]
        assert f"| accuracy | {measured[f'eval_{name}_accuracy']:.3f} |" in part
        assert ("| label | attribute |" in part) is (name != "ood_far")
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in ModelCard(card).data.eval_results}
    assert {name for name, _ in found} == {*sets}
    assert found["ood", "worst_group_accuracy"] == measured["eval_ood_worst_group_accuracy"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("several_pairs", [False, True])
def test_what_held_out_pairs_say_is_in_the_card(tmp_path, several, several_pairs):
    """With one evaluation set beside its metrics, with several in a part of its own; without any group too."""
    sets = {"iid": small.rows(8), "ood": small.rows(12, seed=3)}
    held_out = [{**row, "label": number % 2} for number, row in enumerate(small.pairs(6, seed=4))]
    pairs = {"colour": held_out, "place": held_out[:4]} if several_pairs else held_out
    run = small.trainer(
        tmp_path,
        eval_dataset=sets if several else sets["iid"],
        eval_pair_dataset=pairs,
        compute_metrics=GroupMetrics(),
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    measured = run.evaluate_pair_sets(pairs)
    card = card_of(run)
    part = card.split("### held-out pairs\n")[1].split("##")[0] if several else card
    shown = {"flip rate": "flip_rate", "pair accuracy": "pair_accuracy"}
    if several_pairs:
        shown |= {f"{title}, {name}": f"{name}/{key}" for title, key in shown.items() for name in pairs}
    for title, key in shown.items():
        assert f"\n| {title} | {measured[f'eval_{key}']:.3f} |\n" in part
    assert re.search(r"\|\n\nFlip rate: .* Pair accuracy: .*\n\n", part)  # a text of its own below the table
    assert ("Measured on the iid, ood, held-out pairs sets" in card) is several
    assert {r.dataset_split for r in ModelCard(card).data.eval_results} == ({*sets} if several else {"evaluation"})


@pytest.mark.parametrize("own", [{}, {"f1": 0.25, "my|score": 2, "confusion": [[1, 2], [3, 4]], "accuracy": 0.75}])
def test_metrics_of_the_users_own_are_in_the_card(tmp_path, own):
    settings = {"compute_metrics": lambda prediction: dict(own)} if own else {}
    run = small.trainer(tmp_path, eval_dataset=small.rows(8), eval_strategy="steps", eval_steps=3, **settings)
    run.train()
    part = card_of(run).split("## Results")[1].split("## Data")[0]
    loss = run.state.log_history[-2]["eval_loss"]
    shown = "| accuracy | 0.750 |\n| f1 | 0.250 |\n| my\\|score | 2.000 |\n" if own else f"| loss | {loss:.3f} |\n"
    assert f"| --- | --- |\n{shown}\n" in part


def test_a_table_of_groups_is_of_groups():
    assert group_table({"accuracy": 0.5, "loss": 1.0}) == ""
    assert len(group_table({"group_accuracy/a/b": 0.5, "group_n/a/b": 3}).splitlines()) == 2


# ---- Names ----

PARTS = ["a", "/", "|", "\n", "%2F", "%", "`", "<b>", "é", " "]
NAMES = ["".join(parts) for parts in itertools.product(PARTS, repeat=2)]


def test_any_two_names_make_one_group_of_their_own():
    made = {}
    for label, attribute in itertools.product(NAMES, NAMES[::7]):
        name = group_name(label, attribute)
        assert group_parts(name) == (label, attribute) and made.setdefault(name, (label, attribute)) == (
            label,
            attribute,
        )
    assert group_name("landbird", "50 %") == "landbird/50 %"  # ordinary names are themselves
    assert group_parts("n/a/red") == ("n", "a/red")  # of a record before names were escaped


def test_names_do_not_tear_the_tables_of_a_card():
    labels, attributes = ["cat/dog", "cat", "a|b", "two\nlines", "`x`", "<i>"], ["out", "dog/out"]
    pairs = [*itertools.product(range(len(labels)), range(2))]
    references, values = (np.array(column) for column in zip(*pairs, strict=True))
    metrics = GroupMetrics()
    metrics.settings = {"label_names": labels, "attribute_names": attributes}
    found = metrics.combined().compute(predictions=0 * references, references=references, attributes=values)
    assert sum(key.startswith("group_n/") for key in found) == len(pairs)
    record = {"metrics": {"test": found}, "settings": {}, "method": "ipg", "seed": 0, "steps": 1, "seconds": None}
    record |= {"hardware": {"gpus": [], "cpus": 1}, "versions": {}, "commit": "0"}
    card = str(model_card(record, name="x"))
    told = "`cat/dog`, `cat`, `a|b`, `two lines`, `'x'`, `<i>`"
    assert f"trained to tell apart {told}." in card
    table = card.split("| label | attribute |")[1].split("Worst group")[0].strip().splitlines()[2:]
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table]
    assert len(cells) == len(pairs) and {len(row) for row in cells} == {4}
    assert [cells[row][0].strip() for row in (0, 2, 4, 6, 10)] == ["cat/dog", "cat", r"a\|b", "two lines", "&lt;i>"]
    assert len(group_table(found).splitlines()) == 1 + len(pairs)


# ---- Image sizes of timm ----


@pytest.mark.parametrize("kind", ["timm's processor", "another processor", "no processor"])
def test_a_timm_model_of_another_size_works_where_it_is_published(tmp_path, kind):
    made = {"img_size": 32, "patch_size": 16}
    module = timm.create_model("test_vit", num_classes=2, **made)
    model = load_image_classifier(module, model_args=made)
    assert model.config.pretrained_cfg["input_size"] == [3, 32, 32]
    mean = {"mean": [0.1, 0.2, 0.3]}
    processors = {
        "timm's processor": TimmWrapperImageProcessor({**model.config.pretrained_cfg, **mean}),
        "another processor": ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean["mean"]),
        "no processor": None,
    }
    run = small.trainer(tmp_path, model, pair_dataset={}, processing_class=processors[kind])
    run.save_model()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    answers = {answer["label"]: answer["score"] for answer in pipeline("image-classification", str(tmp_path))(image)}
    processor = processors[kind] or TimmWrapperImageProcessor(model.config.pretrained_cfg)
    with torch.no_grad():
        scores = model.eval()(**processor(image, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    # timm resizes by PIL, transformers by torchvision
    assert answers == pytest.approx({"LABEL_0": scores[0], "LABEL_1": scores[1]}, abs=5e-3)


# ---- Modules that safetensors does not store as they are ----


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(3 * small.SIZE**2, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.alias, self.tied = self.again, nn.Linear(8, 8)
        self.tied.weight = self.again.weight
        self.conv = nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)
        self.register_buffer("whole", torch.zeros(4))
        self.register_buffer("part", self.whole[:2])

    def forward(self, pixel_values):
        inner = torch.relu(
            self.tied(torch.relu(self.alias(torch.relu(self.again(self.first(pixel_values.flatten(1)))))))
        )
        return ImageClassifierOutput(logits=self.head(inner))


def test_a_module_with_shared_weights_is_saved_and_goes_on(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    whole = small.trainer(tmp_path / "whole", Shared(), max_steps=4, **settings)
    start = small.weights(whole.model)
    whole.train()
    on = Shared()
    on.load_state_dict(start)
    small.trainer(tmp_path / "on", on, max_steps=2, **settings).train()
    again = small.trainer(tmp_path / "on", Shared(), max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    assert small.bit_equal(small.weights(whole.model), small.weights(again.model))
    assert not torch.equal(start["again.weight"], whole.model.again.weight)
    loaded = Shared()
    load_model(loaded, tmp_path / "whole" / "checkpoint-4" / "model.safetensors", strict=False)
    assert small.bit_equal(small.weights(whole.model), small.weights(loaded))


class Undeclared(PreTrainedModel):
    config_class = ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second, self.head = nn.Linear(3 * small.SIZE**2, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.post_init()

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.head(self.third(self.second(self.first(pixel_values.flatten(1))))))


class Declared(Undeclared):
    _tied_weights_keys: ClassVar = {"third.weight": "second.weight"}


def test_what_save_pretrained_would_refuse_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"Undeclared has .* one tensor, second\.weight and third\.weight"):
        small.trainer(tmp_path, Undeclared(ViTConfig(num_labels=2)))
    run = small.trainer(
        tmp_path, Declared(ViTConfig(num_labels=2, tie_word_embeddings=True)), save_strategy="steps", save_steps=3
    )
    run.train()
    saved = Declared.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(saved.third.weight, run.model.third.weight)


# ---- Settings ----


def test_the_saved_settings_are_json(tmp_path):
    run = small.trainer(tmp_path, max_loss_scale=math.inf, invariance_threshold=math.inf)
    run.save_model()

    def refuse(constant):
        raise AssertionError(constant)

    saved = json.loads((tmp_path / "training_args.json").read_text(), parse_constant=refuse)
    assert float(saved["max_loss_scale"]) == math.inf and saved["alpha"] == 1.0
    values = {"a": [math.nan, -math.inf, {"b": math.inf}], "c": 1.5, "d": None, "e": True}
    assert json_values(values) == {"a": ["NaN", "-Infinity", {"b": "Infinity"}], "c": 1.5, "d": None, "e": True}
