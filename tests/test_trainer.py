# SPDX-License-Identifier: Apache-2.0
"""`IPGTrainer` beside `Trainer`: what goes in and comes out, models without a linear head, and refusals."""

import copy

import datasets
import numpy as np
import pytest
import small
import timm
import torch
from PIL import Image
from small import bit_equal, descending, differences, logged, trainer, weights
from torch import nn
from transformers import Trainer, TrainingArguments, ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from ipg_hf import IPGConfig, IPGTrainer, find_head
from ipg_hf.baselines import PairPenaltyTrainer
from ipg_hf.guidance import invariance_divergence

RUNTIME = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
RUNTIME |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


@pytest.fixture
def warnings_of(caplog):
    """The library's warnings so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("ipg_hf") and r.levelname == "WARNING"]


# ---- R10: without pairs ----


def test_without_pairs_it_is_trainer_bit_for_bit(tmp_path):
    ends = []
    for kind in (Trainer, IPGTrainer):
        folder = tmp_path / kind.__name__
        run = trainer(
            folder,
            small.vit(dropout=0.1),
            small.rows(22),
            {},
            kind,
            eval_dataset=small.rows(10, seed=5),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            max_steps=8,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=3,
        )
        run.train()
        history = [{k: v for k, v in entry.items() if k not in RUNTIME} for entry in run.state.log_history]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        ends.append((weights(run.model), small.optimizer_state(run.model, run.optimizer), history, files))
    (model, state, history, files), (own_model, own_state, own_history, own_files) = ends
    assert bit_equal(model, own_model) and bit_equal(state, own_state) and state
    assert history == own_history and any("eval_accuracy" in entry for entry in history)
    assert [name.replace("training_args.bin", "training_args.json") for name in files] == own_files
    assert any("checkpoint-6/optimizer.pt" in name for name in files)


def test_the_default_warm_up_is_the_one_difference_to_trainer(tmp_path):
    """It keeps the first few steps at a high rate from the constant output; with a value given it is Trainer's."""
    given = {"max_steps": 11, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    given |= {"save_strategy": "no", "per_device_train_batch_size": 4}
    ends = []
    for args in (
        IPGConfig(str(tmp_path), **given),
        TrainingArguments(str(tmp_path), **given, warmup_steps=0.1),
        IPGConfig(str(tmp_path), **given, warmup_steps=0),
        TrainingArguments(str(tmp_path), **given),
    ):
        kind = IPGTrainer if isinstance(args, IPGConfig) else Trainer
        run = kind(small.vit(), args, train_dataset=small.rows(24))
        run.train()
        ends.append(([entry["learning_rate"] for entry in logged(run)], weights(run.model)))
    (ours, our_model), (warm, warm_model), (without, model_without), (theirs, their_model) = ends
    assert ours == warm and bit_equal(our_model, warm_model) and ours[:3] == pytest.approx([0, 2.5e-5, 5e-5])
    assert without == theirs and bit_equal(model_without, their_model) and theirs[0] == 5e-5 == max(theirs)
    assert not bit_equal(our_model, their_model)


# ---- Batch norm in the task forward (R3) ----


def test_freeze_norm_leaves_statistics_and_trains_the_affine_parameters(tmp_path, warnings_of):
    changed = {}
    for freeze in (True, False):
        run = trainer(tmp_path, small.resnet(), freeze_norm=freeze, max_steps=2)
        assert any("freeze_norm=True" in message for message in warnings_of()) is not freeze
        before = weights(run.model)
        run.train()
        changed[freeze] = {key for key, value in weights(run.model).items() if not torch.equal(value, before[key])}
    assert not any("running" in key or "num_batches" in key for key in changed[True])
    assert any("running" in key for key in changed[False])
    affine = {key for key in before if "normalization.weight" in key or "normalization.bias" in key}
    assert affine and affine <= changed[True]


def test_a_network_without_batch_norm_is_not_warned_of(tmp_path, warnings_of):
    trainer(tmp_path)
    assert warnings_of() == []


# ---- Runs ----


def test_a_trainer_trains_again(tmp_path):
    """A second run begins anew in the pairs, and one that resumes goes on."""
    pair_set = small.Recorded(small.pairs(50))
    run = trainer(tmp_path, pair_dataset=pair_set, save_strategy="steps", save_steps=2, max_steps=4, check_pairs=False)
    pair_set.drawn.clear()
    run.train()
    first = list(pair_set.drawn)
    pair_set.drawn.clear()
    run.evaluate(small.rows(4))
    run.train()
    assert pair_set.drawn == first and run.progress.positions == {"pairs": 16}
    last = weights(run.model)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bit_equal(weights(run.model), last)
    assert pair_set.drawn[-8:] == first[-8:]
    assert torch.isfinite(run.model.classifier.weight).all()


def test_model_init_trains_as_the_model_does(tmp_path):
    run = trainer(tmp_path, model=None)
    fresh = IPGTrainer(
        model_init=lambda: small.vit(),
        args=small.config(tmp_path),
        train_dataset=small.rows(24),
        pair_dataset=small.pairs(10),
    )
    run.train()
    fresh.train()
    assert bit_equal(weights(run.model), weights(fresh.model))


# ---- Evaluation of pairs ----


@pytest.mark.parametrize("distance", small.DISTANCES)
def test_evaluate_pairs(tmp_path, distance):
    pairs, settings = small.pairs(11), small.DISTANCES[distance]
    run = trainer(tmp_path, small.vit(dropout=0.5), per_device_eval_batch_size=4, **settings)
    run.model.train()
    measured = run.evaluate_pairs(pairs, metric_key_prefix="test")
    assert run.model.training
    model = copy.deepcopy(run.model).eval()
    head, features = find_head(model), []
    head.modules[0].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        a, b = (model(torch.stack([row[f"pixel_values_{side}"] for row in pairs])).logits for side in "ab")
        wanted, divergence = small.distance_by_hand(distance, head.weight, torch.cat(features), torch.cat([a, b]))
    assert measured == {
        "test_flip_rate": pytest.approx((a.argmax(-1) != b.argmax(-1)).float().mean().item()),
        "test_divergence": pytest.approx(divergence.item(), rel=1e-3),  # by hand it cancels in float32
        "test_distance": pytest.approx(wanted.item(), rel=1e-3),
    }
    assert run.evaluate_pairs(small.pairs(5, same=True)) == dict.fromkeys(
        ["eval_flip_rate", "eval_divergence", "eval_distance"], 0.0
    )
    with pytest.raises(ValueError, match="empty"):
        run.evaluate_pairs(small.Recorded([]))


# ---- A head is needed only where it is used ----


class Headless(nn.Module):
    """A classifier whose logits are no linear function of a layer's input.

    Args:
        scale: "cosine" compares directions with a weight of no linear layer; "temperature" multiplies the output of
            the last linear layer by a trained factor.
    """

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.is_cosine = scale == "cosine"
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * small.SIZE**2, 16), nn.Tanh())
        self.last = nn.ParameterList([torch.randn(2, 16)]) if self.is_cosine else nn.Linear(16, 2)
        self.factor = nn.Parameter(torch.tensor(4.0))

    def forward(self, pixel_values):
        z = self.body(pixel_values)
        normalize = nn.functional.normalize
        logits = normalize(z) @ normalize(self.last[0]).T if self.is_cosine else self.last(z)
        return ImageClassifierOutput(logits=self.factor * logits)


both_heads = pytest.mark.parametrize("scale", ["cosine", "temperature"])


@both_heads
def test_a_model_without_a_linear_head_trains_on_the_divergence(tmp_path, scale):
    """Each corrective update is one step along the gradient of √c, whole and in chunks; step 4 acts."""
    pairs, ends = small.pairs(4, dtype=torch.float64), []
    sides = torch.cat([torch.stack([row[f"pixel_values_{side}"] for row in pairs]) for side in "ab"])
    for chunk in (None, 3):
        run, around = descending(
            tmp_path,
            pair_dataset=pairs,
            build=lambda: Headless(scale),
            pair_chunk_size=chunk,
            alpha=0.1,
            max_steps=2,
            **small.DIVERGENCE,
        )
        run.train()
        assert run.head is None
        assert [entry["ipg/violated"] for entry in logged(run)] == [1, 1]  # above the default threshold
        assert 0 < max(small.scales(run)) < 1
        for before, middle in zip(around.before, around.middle, strict=True):
            model = Headless(scale).double()
            model.load_state_dict(before[0])
            a, b = model(sides).logits.log_softmax(-1).chunk(2)
            (((a.exp() - b.exp()) * (a - b)).sum(-1).mean() / 2).sqrt().backward()
            wanted = {name: value.detach() - small.RATE * value.grad for name, value in model.named_parameters()}
            assert differences(middle[0], wanted) < 1e-12
            assert differences(before[0], wanted) > 1e-4
        ends.append(weights(run.model))
    assert differences(*ends) < 1e-12


@both_heads
def test_pairs_are_evaluated_on_a_model_without_a_linear_head(tmp_path, scale):
    model, pairs = Headless(scale), small.pairs(7)
    measured = trainer(tmp_path, model, pair_dataset=pairs, **small.DIVERGENCE).evaluate_pairs(pairs)
    with torch.no_grad():
        a, b = (model(torch.stack([row[f"pixel_values_{side}"] for row in pairs])).logits for side in "ab")
    divergence = invariance_divergence(a, b).item()
    flips = (a.argmax(-1) != b.argmax(-1)).float().mean().item()
    assert flips > 0 and measured == {
        "eval_flip_rate": pytest.approx(flips),
        "eval_divergence": pytest.approx(divergence, rel=1e-5),
        "eval_distance": pytest.approx(divergence**0.5, rel=1e-5),
    }
    # a trainer without pairs too; for a distance that needs a head there is none
    for kind in ({"pair_dataset": {}}, {"kind": PairPenaltyTrainer, "pair_dataset": pairs}):
        assert trainer(tmp_path, model, **kind, **small.DIVERGENCE).evaluate_pairs(pairs) == measured
        others = {name: value for name, value in measured.items() if name != "eval_distance"}
        for distance in ({}, small.PAPER):
            assert trainer(tmp_path, model, **kind, **distance).evaluate_pairs(pairs) == others
    with pytest.raises(ValueError, match="is not this model's classifier head"):  # one that is given is proven
        trainer(tmp_path, model, pair_dataset={}, head="body.1").evaluate_pairs(pairs)


def test_every_method_measures_the_same_distance(tmp_path):
    pairs = small.pairs(7)
    measured = [
        trainer(tmp_path, small.vit(), **settings).evaluate_pairs(pairs)
        for settings in ({}, {"pair_dataset": {}}, {"kind": PairPenaltyTrainer}, small.DIVERGENCE)
    ]
    assert measured[0] == measured[1] == measured[2]
    assert measured[3]["eval_distance"] > 2 * measured[0]["eval_distance"] > 0


@both_heads
def test_the_kl_penalty_trains_a_model_without_a_linear_head(tmp_path, scale):
    ends = []
    for weight in (1.0, 5.0):
        run = trainer(tmp_path, Headless(scale), kind=PairPenaltyTrainer, pair_penalty_weight=weight)
        run.train()
        assert run.head is None and all(entry["ipg/penalty"] > 0 for entry in logged(run))
        ends.append(weights(run.model))
    assert differences(*ends) > 1e-6


@both_heads
@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({}, "Or compare the outputs alone: invariance_distance='divergence'."),
        ({"invariance_distance": "rationale"}, "Or compare the outputs alone: invariance_distance='divergence'."),
        ({"kind": PairPenaltyTrainer, "pair_objective": "features"}, "outputs alone: pair_objective='kl'."),
        ({"kind": PairPenaltyTrainer, "pair_objective": "rationales"}, "outputs alone: pair_objective='kl'."),
        ({"head": "body.1"} | small.DIVERGENCE, ""),  # a head that is given is proven in any case
    ],
    ids=["default", "rationale", "features", "rationales", "head given"],
)
def test_what_needs_a_linear_head_refuses_a_model_without_one(tmp_path, scale, settings, way_out):
    with pytest.raises(ValueError, match=r"is not this model.s classifier head|do not make the logits") as error:
        trainer(tmp_path, Headless(scale), **settings)
    assert str(error.value).endswith(way_out) and ("outputs alone" in str(error.value)) is bool(way_out)
    trainer(tmp_path, small.no_bias(), **settings | ({"head": "inner.2"} if "head" in settings else {}))


# ---- Data ----


def hf_rows(n, seed=0, attribute=True):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(n)]
    columns = {"image": images, "label": [i % 2 for i in range(n)]}
    columns |= {"attribute": [i // 2 % 2 for i in range(n)], "note": ["x"] * n} if attribute else {}
    return datasets.Dataset.from_dict(columns)


def hf_pairs(n, seed=1):
    a, b = hf_rows(n, seed), hf_rows(n, seed + 100)
    return datasets.Dataset.from_dict({"image_a": a["image"][:], "image_b": b["image"][:], "source_id": list(range(n))})


PROCESSOR = {"size": {"height": small.SIZE, "width": small.SIZE}}


@pytest.mark.parametrize("remove", [True, False])
def test_attributes_reach_metrics_and_never_the_model(tmp_path, remove):
    given, forwards = [], []
    model = small.vit()
    model.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(set(kwargs)), with_kwargs=True)

    def metrics(prediction):
        given.append(prediction.label_ids)
        return {"seen": 1.0}

    metrics.takes_attributes = True
    rows = small.rows(10, attribute=True) if not remove else None
    settings = {"processing_class": ViTImageProcessor(**PROCESSOR)} if remove else {}
    train = hf_rows(24) if remove else small.rows(24, attribute=True)
    run = trainer(
        tmp_path,
        model,
        train,
        eval_dataset=hf_rows(10) if remove else rows,
        compute_metrics=metrics,
        remove_unused_columns=remove,
        max_steps=1,
        **settings,
    )
    run.train()
    run.evaluate()
    labels, attributes = given[0]
    assert labels.tolist() == [i % 2 for i in range(10)]
    assert attributes.tolist() == [i // 2 % 2 for i in range(10)]
    assert forwards and not any("attribute" in names or "note" in names for names in forwards)
    # a set without the column has plain labels
    run.evaluate(hf_rows(6, attribute=False) if remove else small.rows(6))
    assert given[1].tolist() == [i % 2 for i in range(6)]


def test_raw_images_are_transformed(tmp_path):
    """Train, evaluation and pair sets give what the processor gives."""
    processor = ViTImageProcessor(**PROCESSOR)
    seen = []
    model = small.vit()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs["pixel_values"])), with_kwargs=True
    )
    train, pair_dataset = hf_rows(8), hf_pairs(4)
    run = trainer(
        tmp_path,
        model,
        train,
        pair_dataset,
        eval_dataset=hf_rows(6, seed=9),
        processing_class=processor,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    run.train()
    run.evaluate()

    def processed(images):
        return processor(list(images), return_tensors="pt")["pixel_values"]

    batches = [values for training, values in seen if training]
    assert torch.equal(batches[0], processed(train["image"]))
    pair_batch = next(values for training, values in seen if not training and len(values) == 8)
    wanted = processed([*pair_dataset["image_a"], *pair_dataset["image_b"]])
    order = [next(i for i in range(4) if torch.equal(wanted[i], image)) for image in pair_batch[:4]]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(pair_batch[4:], wanted[[4 + i for i in order]])
    assert torch.equal(seen[-1][1], processed(hf_rows(6, seed=9)["image"]))
    measured = run.evaluate_pairs(pair_dataset)
    assert measured == pytest.approx(run.evaluate_pairs([
        {"pixel_values_a": a, "pixel_values_b": b} for a, b in zip(*wanted.chunk(2), strict=True)
    ]))  # fmt: skip


def test_a_pair_batch_larger_than_the_set_uses_all(tmp_path, warnings_of):
    recorded = small.Recorded(small.pairs(3))
    run = trainer(tmp_path, pair_dataset=recorded, per_device_pair_batch_size=8, max_steps=2, check_pairs=False)
    (message,) = warnings_of()
    assert "3 pairs" in message and "8" in message
    recorded.drawn.clear()
    run.train()
    steps = recorded.drawn[-6:]
    assert sorted(steps[:3]) == sorted(steps[3:]) == [0, 1, 2]
    assert run.progress.positions == {"pairs": 6}


def test_each_named_set_has_an_order_of_its_own(tmp_path):
    sets = {name: small.Recorded(small.pairs(10)) for name in ("one", "other")}
    trainer(tmp_path, pair_dataset=sets, check_pairs=False).train()
    assert sets["one"].drawn[-12:] != sets["other"].drawn[-12:]


def test_pairs_do_not_disturb_the_global_generators(tmp_path):
    """Random transforms of the user's own: what the run draws besides is the same with any pair set."""

    class Noisy(small.Recorded):
        def __getitem__(self, row):
            noise = torch.rand(()).item() + np.random.rand()
            return {name: value + noise for name, value in super().__getitem__(row).items()}

    states = []
    for pair_dataset in (small.pairs(10), Noisy(small.pairs(10))):
        run = trainer(tmp_path, small.vit(dropout=0.5), pair_dataset=pair_dataset, check_pairs=False, max_steps=2)
        torch.manual_seed(0)
        np.random.seed(0)
        run.train()
        run.evaluate_pairs(small.pairs(4))
        states.append((torch.get_rng_state(), np.random.get_state()[1]))
    assert torch.equal(states[0][0], states[1][0])
    assert np.array_equal(states[0][1], states[1][1])


def test_augmentation_changes_with_the_epoch(tmp_path):
    seen = []
    model = small.vit()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]) if module.training else None, with_kwargs=True
    )
    run = trainer(
        tmp_path,
        model,
        hf_rows(8),
        hf_pairs(4),
        processing_class=ViTImageProcessor(**PROCESSOR),
        random_crop_scale=0.3,
        random_flip=True,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    run.train()
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


# ---- Errors of the constructor ----


def without_linear_head():
    model = small.vit()
    model.classifier = nn.Sequential(nn.Flatten(), nn.LayerNorm(32), nn.Bilinear(32, 32, 2))
    return model


def with_labels(labels):
    return datasets.Dataset.from_dict({"pixel_values": [[0.0]] * len(labels), "label": labels})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"args": "plain"}, ["TrainingArguments", "IPGConfig"]),
        ({"model": "timm"}, ["timm module", "load_image_classifier(model)"]),
        ({"train": with_labels([0, 1, 2])}, ["train_dataset", "label 2", "row 2", "num_labels"]),
        ({"eval_dataset": {"far": with_labels([0, -1])}}, ["eval_dataset['far']", "label -1", "row 1"]),
        ({"model": "no head"}, ["ViTForImageClassification", "no linear layer", "head=", "distance='divergence'"]),
        ({"head": "vit.layers"}, ["head='vit.layers'"]),
        ({"pair_dataset": {"empty": small.Recorded([])}}, ["pair_dataset['empty']", "empty"]),
    ],
    ids=["args", "timm", "train labels", "eval labels", "no head", "wrong head", "empty pairs"],
)
def test_constructors_that_cannot_work(tmp_path, arguments, words):
    if arguments.get("model") == "timm":
        arguments = arguments | {"model": timm.create_model("test_vit", num_classes=2)}
    if arguments.get("model") == "no head":
        arguments = arguments | {"model": without_linear_head()}
    with pytest.raises(ValueError) as error:
        if arguments.get("args") == "plain":
            IPGTrainer(small.vit(), TrainingArguments(str(tmp_path), use_cpu=True), pair_dataset=small.pairs(4))
        else:
            trainer(tmp_path, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_ignored_labels_are_in_range(tmp_path):
    trainer(tmp_path, train=with_labels([0, 1, -100]))
