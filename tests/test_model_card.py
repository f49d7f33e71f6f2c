# SPDX-License-Identifier: Apache-2.0
"""Model cards: the whole text of one, what is said where nothing is known, and those of the published recipes."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import small
import yaml
from huggingface_hub import ModelCard
from small import trainer

from ipg_hf import IPGTrainer
from ipg_hf.cli import main
from ipg_hf.data import ABOUT, LOADERS
from ipg_hf.hub.card import MARKER, TAGS, model_card
from ipg_hf.metrics import GroupMetrics
from ipg_hf.record import hub_id

ROOT = Path(__file__).resolve().parent.parent

METRICS = {
    "loss": 0.1,
    "accuracy": 0.9,
    "worst_group_accuracy": 0.75,
    "adjusted_accuracy": 0.95,
    "group_accuracy/cat/indoor": 0.75,
    "group_n/cat/indoor": 20.0,
    "group_accuracy/cat/outdoor": 1.0,
    "group_n/cat/outdoor": 30.0,
    "flip_rate": 0.125,
}
RECORD = {
    "config": {
        "dataset": "files",
        "dataset_options": {"attribute": "place"},
        "alpha": 0.5,
        "invariance_distance": "rationale",
        "learning_rate": 0.01,
        "load_best_model_at_end": True,
        "metric_for_best_model": "worst_group_accuracy",
        "output_dir": "/home/me/secret/out",
        "hub_token": "hf_planted",
        "pairs": {"maker": "match", "num_pairs": 40},
    },
    "seed": 3,
    "method": "ipg",
    "metrics": {"validation": {"accuracy": 0.5}, "test": METRICS},
    "chosen_step": 50,
    "steps": 150,
    "seconds": 12.34,
    "versions": {"python": "3.11.7", "ipg_hf": "0.1.0", "timm": None},
    "commit": "abc123",
    "hardware": {"cpus": 2, "gpus": []},
    "base_model": "someone/net",
    "about": {**asdict(ABOUT["files"]), "title": "Pets", "license": "CC0"},
    "data": {
        "train": 100,
        "pair_sets": {"": {"pairs": 40, "findings": [["warning", "few-pairs", "the set has 40 pairs"]]}},
    },
}
TEXT = """---
base_model: someone/net
library_name: transformers
license: mit
metrics:
- accuracy
- worst_group_accuracy
pipeline_tag: image-classification
tags:
- ipg
- robustness
- spurious-correlation
- cats
model-index:
- name: pets
  results:
  - task:
      type: image-classification
    dataset:
      name: Pets
      type: files
      split: test
      revision: abc123
    metrics:
    - type: accuracy
      value: 0.9
      name: accuracy
    - type: worst_group_accuracy
      value: 0.75
      name: worst-group accuracy
---

<!-- Written by ipg_hf, which writes it anew after a training. Without this line it leaves the card as it is. -->

# pets

[someone/net](https://huggingface.co/someone/net), trained to tell `cat` and to ignore the attribute `place`.

## Results

Measured on the test split of Pets (`files`), as ipg_hf draws it at commit `abc123` with seed 3. The checkpoint (step \
50) was chosen by `worst_group_accuracy` on the validation split, the test split was read once.

|  | this model | same training without pairs (ERM) |
| --- | --- | --- |
| accuracy | 0.900 | 0.600 |
| worst-group accuracy | 0.750 | 0.100 |
| adjusted accuracy | 0.950 | not known |
| flip rate | 0.125 | not known |

| label | attribute | images | accuracy | accuracy, ERM |
| --- | --- | --- | --- | --- |
| cat | indoor | 20 | 0.750 | 0.100 |
| cat | outdoor | 30 | 1.000 | not known |

Worst group: the lowest accuracy of these. Adjusted accuracy: their mean, weighted by their sizes in training. Flip \
rate: share of held-out pairs, which differ in the attribute alone, whose predictions differ.

Over 2 seeds (3, 4; this model is the first): accuracy 0.800 ± 0.141, worst-group accuracy 0.500 ± 0.354 (mean ± \
standard deviation).

## What it ignores, and how that was taught

Training data: Pets. A folder of the user's own. How the attribute goes with the label is not recorded.

Invariance pair-guided learning ([arXiv 2502.18975](https://arxiv.org/abs/2502.18975)): each optimizer step first \
moves the weights so that the rationales of the two images of each pair agree, then along the task gradient. Pairs: \
two training images of one label and different attribute. Their number: 40.

The fast form of `ipg pairs check` found in them:

- warning `few-pairs`: the set has 40 pairs

## Training

Optimizer steps: 150; seconds: 12; hardware: 2 processor cores, no GPU; software: python 3.11.7, ipg_hf 0.1.0.

| setting | value |
| --- | --- |
| `alpha` | 0.5 |
| `invariance_threshold` | 0.01 |
| `max_loss_scale` | 1.0 |
| `invariance_distance` | rationale |
| `rationale_reduction` | mean |
| `rationale_norm` | spectral |
| `per_device_pair_batch_size` | 32 |
| `pair_combination` | mean |
| `learning_rate` | 0.01 |
| `optim` | adamw_torch_fused |
| `lr_scheduler_type` | linear |
| `warmup_steps` | 0.1 |
| `per_device_train_batch_size` | 8 |
| `max_steps` | -1 |
| `freeze_norm` | False |

## Limits

- The figures are of the data named above. On other data they can differ: measure with `ipg evaluate`.
- It was taught to ignore what its pairs show, as well as they show it, and no other shortcut.
- Licence of this model: mit; of the images it was trained on: CC0.

## How to use

```python
from transformers import pipeline

classify = pipeline("image-classification", model="me/pets")
print(classify("image.png"))
```

## How to reproduce

With ipg_hf at commit `abc123`, this recipe as `recipe.yaml`:

```yaml
dataset: files
dataset_options:
  attribute: place
alpha: 0.5
invariance_distance: rationale
learning_rate: 0.01
load_best_model_at_end: true
metric_for_best_model: worst_group_accuracy
pairs:
  maker: match
  num_pairs: 40
```

```bash
ipg train --config recipe.yaml --output_dir out
```

## Citation

```bibtex
@misc{ipg2025,
  title = {Invariance Pair-Guided Learning: Enhancing Robustness in Neural Networks},
  year = {2025},
  eprint = {2502.18975},
  archivePrefix = {arXiv}
}
```
"""


def test_the_whole_text():
    twin = {"metrics": {"test": {"accuracy": 0.6, "worst_group_accuracy": 0.1, "group_accuracy/cat/indoor": 0.1}}}
    other = {**RECORD, "seed": 4, "metrics": {"test": {"accuracy": 0.7, "worst_group_accuracy": 0.25}}}
    card = model_card(RECORD, name="me/pets", twin=twin, others=[other], license="mit", tags=["cats"])
    assert f"{card}\n" == TEXT
    # what the Hub reads is what was meant
    read = ModelCard(str(card)).data
    assert [result.metric_value for result in read.eval_results] == [0.9, 0.75]
    assert (read.base_model, read.license, read.model_name) == ("someone/net", "mit", "pets")


def test_nothing_known():
    text = str(model_card({}, name="x"))
    read = ModelCard(text).data
    assert read.eval_results is None and read.license is None and read.base_model is None and read.tags is None
    assert "It has not been evaluated." in text
    assert "The training data are not known to this card." in text
    assert "Whether pairs were used is not known." in text
    assert "Optimizer steps: not known; seconds: not known; hardware: not known; software: not known." in text
    assert "not given by whoever trained it; of the images it was trained on: not known" in text
    assert "The script that trained it is not known" in text
    assert "None" not in text and "\n\n\n" not in text
    guided = str(model_card({"method": "ipg"}, name="x"))
    assert "Pairs: their source is not known to this card. Their number: not known." in guided
    assert "What `ipg pairs check` finds in them: not known." in guided
    for versions, told in (
        ({"ipg_hf": "0.1.0"}, "With ipg_hf 0.1.0, this"),
        ({}, "With ipg_hf (version not known), this"),
    ):
        assert told in str(model_card({**RECORD, "commit": None, "versions": versions}, name="x"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pair_sets": {"a": {"pairs": 5, "findings": []}}}, "found no errors and no warnings"),
        ({"pair_sets": {"a": {"pairs": 5, "findings": [["info", "change-share", "x"]]}}}, "no errors and no warnings"),
        ({"pair_sets": {"a": {"pairs": None, "findings": None}}}, "Their number: not known (a)"),
        ({"pair_sets": {"a": {"pairs": 5, "findings": [["error", "empty", "x"]]}}}, "- error `empty` (a): x"),
    ],
)
def test_what_the_linter_found(change, told):
    assert told in str(model_card({**RECORD, "data": change}, name="x"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"invariance_distance": "divergence"}, "so that the outputs on the two images of each pair agree, then along"),
        ({"pair_objective": "kl"}, "A penalty on pairs was added to the loss (`pair_objective: kl`). Pairs: two"),
    ],
)
def test_what_the_pairs_did(change, told):
    text = str(model_card({**RECORD, "config": {**RECORD["config"], **change}}, name="x"))
    assert told in text and "the rationales of the two images" not in text


def test_what_the_pairs_did_by_default():
    config = {name: value for name, value in RECORD["config"].items() if name != "invariance_distance"}
    assert "so that the outputs on the two images" in str(model_card({**RECORD, "config": config}, name="x"))
    assert "so that the rationales of the two images" in str(model_card(RECORD, name="x"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"degrade_pairs": {"residual": 0.3}}, "The pairs were spoiled on purpose: {'residual': 0.3}."),
        ({"mix_pairs": {"num_pairs": 900}}, "with mixtures of two pairs, by which a smaller number was enlarged"),
    ],
)
def test_what_became_of_the_pairs(change, told):
    assert told in str(model_card({**RECORD, "config": {**RECORD["config"], **change}}, name="x"))
    assert told not in str(model_card(RECORD, name="x"))


def test_a_regression_and_a_base_model_of_ones_own():
    metrics = {"mae": 0.1, "worst_group_mae": 0.2, "group_mae/above/red": 0.2, "group_n/above/red": 4.0}
    record = {**RECORD, "metrics": {"test": metrics}, "base_model": None}
    text = str(model_card(record, name="x"))
    assert "(what it was fine-tuned from is not known), trained to predict a number" in text
    assert "| worst-group mean absolute error | 0.200 |" in text
    assert "Worst group: the largest error of these.\n" in text and "Flip rate" not in text
    scratch = {**RECORD, "base_model": None, "config": {"dataset": "files", "model_type": "vit"}}
    assert "A `vit` from random weights" in str(model_card(scratch, name="x"))


def test_ids_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/net").mkdir(parents=True)
    assert hub_id("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert [hub_id(name) for name in (None, "", "net", "models/net", "/a/b", "a/b/c")] == [None] * 6


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [("linear", True), ("constant_with_warmup", True), ("constant", False), ("reduce_lr_on_plateau", False)],
)
def test_a_warm_up_is_shown_where_the_schedule_has_one(schedule, shown):
    record = {"config": {"lr_scheduler_type": schedule, "warmup_steps": 0.2}, "method": "erm"}
    assert ("| `warmup_steps` | 0.2 |" in str(model_card(record, name="pets"))) is shown


def test_the_published_cards_are_those_of_the_records():
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        import cards
    finally:
        sys.path.pop(0)
    made = cards.cards()
    assert len(made) >= 27
    assert {path.name: path.read_text() for path in (ROOT / "model_cards").glob("*")} == made
    # another record is another card
    changed = json.loads((ROOT / "recipes/digits/results/ipg_resnet-seed0.json").read_text())
    changed["metrics"]["test"]["worst_group_accuracy"] = 0.123
    recipe = yaml.safe_load((ROOT / "recipes/digits/ipg_resnet.yaml").read_text())
    assert "| worst-group accuracy | 0.123 |" in str(model_card(cards.completed(changed, recipe), name="x"))


def test_every_benchmark_is_described():
    assert ABOUT.keys() == LOADERS.keys()


# ---- From a trainer ----


def test_a_trainers_card_has_the_metrics_of_the_chosen_step(tmp_path):
    """The best evaluation, not the last (transformers issue 15547)."""
    training = trainer(
        tmp_path,
        train=small.rows(24),
        eval_dataset=small.rows(12, attribute=True),
        compute_metrics=GroupMetrics(),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="worst_group_accuracy",
        learning_rate=0.05,
    )
    training.train()
    training.create_model_card(license="mit", tags="cats")
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    course = {entry["step"]: entry for entry in training.state.log_history if "eval_worst_group_accuracy" in entry}
    best = course[training.state.best_global_step]
    assert any(entry["eval_accuracy"] != best["eval_accuracy"] for entry in course.values())
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "accuracy": best["eval_accuracy"],
        "worst_group_accuracy": best["eval_worst_group_accuracy"],
    }
    assert {r.dataset_split for r in card.data.eval_results} == {"evaluation"}
    assert card.data.license == "mit"
    assert set(card.data.tags) >= {*TAGS, "cats"}
    assert "Their number: 10." in text
    assert "which may have chosen the checkpoint too" in text
    assert f"| `learning_rate` | {training.args.learning_rate} |" in text


def test_a_trainer_without_pairs_or_evaluation(tmp_path):
    IPGTrainer(small.vit(), small.config(tmp_path), train_dataset=small.rows(24)).create_model_card(tags=list(TAGS))
    text = (tmp_path / "README.md").read_text()
    assert "It has not been evaluated." in text and "No pairs were used." in text
    assert ModelCard(text).data.tags is None


def test_a_readme_of_ones_own_stays(tmp_path, caplog):
    training = IPGTrainer(small.vit(), small.config(tmp_path), train_dataset=small.rows(24))
    training.create_model_card(license="mit")
    training.create_model_card(license="cc0-1.0")  # its own card is written anew
    card = (tmp_path / "README.md").read_text()
    assert ModelCard(card).data.license == "cc0-1.0"
    mine = card.replace(MARKER, "mine")
    (tmp_path / "README.md").write_text(mine)
    assert not caplog.records
    training.create_model_card(license="mit")
    assert (tmp_path / "README.md").read_text() == mine
    assert "it stays" in caplog.text


# ---- From the command line ----


def test_ipg_card(tmp_path, capsys):
    run = tmp_path / "pets"
    (run / "erm").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(RECORD))
    assert main(["card", str(run)]) == 0
    alone = capsys.readouterr().out
    assert "# pets" in alone and "ERM" not in alone
    twin = {"metrics": {"test": {"accuracy": 0.6}}}
    (run / "erm" / "run.json").write_text(json.dumps(twin))
    assert main(["card", str(run), "--name", "me/pets", "--license", "mit"]) == 0
    out = capsys.readouterr().out
    assert out == str(model_card(RECORD, name="me/pets", twin=twin, license="mit")) + "\n"
    assert "hf_planted" not in out and "/home/me" not in out
    assert main(["card", str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["card", str(run), "--licence", "mit"])
