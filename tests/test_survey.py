# SPDX-License-Identifier: Apache-2.0
"""Every image classifier of transformers and timm: its head is found and verified, or it is refused with a reason."""

import fnmatch
import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import transformers
from transformers.models.dinat import modeling_dinat

from ipg_hf.cli import main
from ipg_hf.survey import NUM_LABELS, Finding, build_shallow, examine, examine_timm, survey, transformers_classes

# All models without a linear classifier: name -> the reason and the way out that the error gives.
REFUSED = {
    "timm/efficientvim_*": "the logits depend on other layers too .*'weights'.*choose another architecture",
    "timm/volo_*": "'aux_head': it is applied before pooling.*use_aux_head=False",
    "timm/resnet*_clip": "'head.proj'.*it is applied before pooling.*use a .*_clip_gap variant",
    "timm/*_enc": r"has no classifier \(num_classes is 0\): choose a model that has one",
    "ShieldGemma2ForImageClassification": "no linear layer with 7 outputs.*fine-tune its vision tower",
}
# All models that return the mean of several heads: name -> number of heads.
AVERAGED = {
    "DeiTForImageClassificationWithTeacher": 2,
    "LevitForImageClassificationWithTeacher": 2,
    "SwiftFormerForImageClassification": 2,
    "timm/crossvit_*": 2,
    "timm/deit*_distilled_*": 2,
    "timm/efficientformer_*": 2,
    "timm/efficientformerv2_*": 2,
    "timm/iformer_*_dist*": 2,
    "timm/levit*_[13]*": 2,
    "timm/levit*_256": 2,
    "timm/pit_*_distilled_*": 2,
    "timm/repvit_*": 2,
    "timm/swiftformer_*": 2,
}
MODULES = sorted({timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()})
GUIDE = (Path(__file__).resolve().parent.parent / "recipes/guides/models.md").read_text()


def check(finding: Finding):
    """Checks a finding: the model is refused for the documented reason, or has the right number of heads."""
    reasons = [reason for pattern, reason in REFUSED.items() if fnmatch.fnmatchcase(finding.model, pattern)]
    if reasons:
        assert re.search(reasons[0], finding.problem, re.S), finding
        return
    assert not finding.problem, finding
    heads = [count for pattern, count in AVERAGED.items() if fnmatch.fnmatchcase(finding.model, pattern)]
    assert finding.path.count(" + ") + 1 == (heads or [1])[0], finding
    assert finding.features > 0


@pytest.fixture
def natten(monkeypatch):
    """Replaces natten, which DiNAT needs: most machines have no build of it, and transformers 5.23 gives it the axes in
    the wrong order. Here each pixel attends to itself. The head comes after that."""
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
    monkeypatch.setattr(modeling_dinat, "natten2dqkrpb", lambda query, key, *_: (query * key).sum(-1, keepdim=True))
    monkeypatch.setattr(
        modeling_dinat, "natten2dav", lambda attention, value, *_: (attention * value).permute(0, 3, 2, 1, 4)
    )


@pytest.mark.parametrize(("config_class", "model_class"), transformers_classes(), ids=lambda kind: kind.__name__)
def test_the_head_of_every_class_of_transformers_is_found(config_class, model_class, natten):
    torch.manual_seed(0)
    model = build_shallow(config_class, model_class)
    on_meta = next(model.parameters()).is_meta
    assert on_meta == (model_class.__name__ == "ShieldGemma2ForImageClassification")  # all others are computed
    check(examine(model_class.__name__, model))


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_resnet",
        "resnetv2_18",  # a 1×1 convolution
        "hardcorenas_a",
        "levit_128s",  # two averaged heads, batch norm before each
        "crossvit_tiny_240",  # two averaged heads of different widths
        "repvit_m0_9",
        "efficientvit_m0",
        "hieradet_small",
        "efficientvim_m1",
        "volo_d1_224",
        "resnet50_clip",
    ],
)
def test_the_head_of_each_kind_of_timm_model_is_found(name):
    torch.manual_seed(0)
    check(examine_timm(name))


def test_the_head_is_found_after_the_way_out_that_an_error_names():
    found = examine("volo", timm.create_model("volo_d1_224", num_classes=NUM_LABELS, use_aux_head=False))
    assert (found.problem, found.path, found.kind) == ("", "head", "linear")
    found = examine("clip", timm.create_model("resnet50_clip_gap", num_classes=NUM_LABELS))
    assert (found.problem, found.path, found.kind) == ("", "head.fc", "linear")


@pytest.mark.survey
@pytest.mark.parametrize("module", MODULES)
def test_the_head_of_every_model_of_timm_is_found(module):
    """All models on the meta device (layers that reach the logits, shapes), the smallest of each kind with numbers."""
    smallest = {}
    for name in timm.list_models(module=module):
        found = examine_timm(name, "meta")
        check(found)
        if found.kind not in smallest or found.parameters < smallest[found.kind].parameters:
            smallest[found.kind] = found
    assert smallest
    for found in smallest.values():
        torch.manual_seed(0)
        assert examine_timm(found.model.removeprefix("timm/")) == found


def test_the_modules_of_timm_contain_every_model():
    listed = Counter(name for module in MODULES for name in timm.list_models(module=module))
    assert listed == Counter(timm.list_models())


def test_the_guide_states_how_many_heads_are_found():
    stated = re.search(
        r"classes of transformers \(([\d.]+): found in (\d+) of (\d+)\).*timm \(([\d.]+): ([\d,]+) of ([\d,]+)\)", GUIDE
    )
    transformers_version, accepted, classes, timm_version, models, all_models = stated.groups()
    names = [f"timm/{name}" for name in timm.list_models()]
    refused = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in REFUSED)]
    if timm.__version__ == timm_version:
        assert int(all_models.replace(",", "")) == len(names)
        assert int(models.replace(",", "")) == len(names) - len(refused)
    if transformers.__version__ == transformers_version:
        assert (int(accepted), int(classes)) == (len(transformers_classes()) - 1, len(transformers_classes()))
    for pattern in REFUSED:
        assert pattern.removeprefix("timm/") in GUIDE


def test_the_command_prints_a_row_for_each_model(capsys):
    assert main(["heads", "timm/test_vit", "timm/resnet*_clip", "*Levit*Teacher"]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line]
    assert lines[0].split() == ["timm/test_vit", "linear", "64", "head"]
    clips = [line for line in lines if re.match(r"timm/resnet\S+_clip +REFUSED: 'head.proj' is not", line)]
    assert len(clips) == len(timm.list_models("resnet*_clip")) == 5
    assert lines[-2].split()[1:] == [
        "mean",
        "of",
        "2",
        "linear",
        "768",
        "classifier.linear",
        "+",
        "classifier_distill.linear",
    ]
    assert lines[-1] == "2 of 7 models accepted"


def test_the_command_names_an_unknown_model_or_flag(capsys, tmp_path):
    assert main(["heads", "timm/no_such_model"]) == 2
    assert "timm has no model 'no_such_model'" in capsys.readouterr().err
    assert main(["heads", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["heads", "--all"])
    assert "unrecognized arguments: --all" in capsys.readouterr().err


def test_a_saved_model_is_examined_by_its_config(tmp_path):
    build_shallow(transformers.ViTConfig, transformers.ViTForImageClassification).config.save_pretrained(tmp_path)
    config = transformers.ViTConfig.from_pretrained(tmp_path)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    (found,) = survey([str(tmp_path)])
    assert (found.model, found.path, found.features, found.problem) == (str(tmp_path), "classifier", 768, "")
