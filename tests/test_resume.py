# SPDX-License-Identifier: Apache-2.0
"""A run that was killed, or whose disk was full or damaged, ends as the run that was not: to the last bit, logs too."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_processes import Child
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    ViTImageProcessor,
)

from ipg_hf import IPGTrainer
from ipg_hf.baselines import PairPenaltyTrainer
from ipg_hf.checkpoints import newest_checkpoint, whole_or_removed
from ipg_hf.pairs.checks import ONLY_SET

STEPS, LOG, SAVE = 11, 3, 2
RUNTIME = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "ipg/pair_wait"}

# ---- The run ----


def images(n, seed):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(n)]


def raw_pairs(n, seed):
    labels = [row % 2 for row in range(n)]
    return datasets.Dataset.from_dict({"image_a": images(n, seed), "image_b": images(n, seed + 1), "label": labels})


def noisy(batch):
    """A user's own transform, which draws from all global generators."""
    noise = [random.random() + np.random.rand() + torch.rand(()).item() for _ in batch["pixel_values_a"]]
    return {
        name: [torch.as_tensor(value) + n for value, n in zip(values, noise, strict=True)]
        for name, values in batch.items()
    }


def pair_sets(kind):
    """Both kinds hold a map-style set whose size no batch divides."""
    if kind == "raw":
        stream = raw_pairs(9, 20).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4)
        return {"colour": raw_pairs(10, 10), "a stream of backgrounds": stream}
    rows = small.pairs(10)
    own = datasets.Dataset.from_dict({name: [row[name].tolist() for row in rows] for name in rows[0]})
    return {"own transform": own.with_transform(noisy), "plain": small.pairs(7, seed=5)}


class Slow(TrainerCallback):
    """Leaves the parent time to kill the run in the middle."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.1)


class FullDisk(TrainerCallback):
    """From the third checkpoint on no file can grow beyond a size."""

    def __init__(self, size):
        self.size = size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 * SAVE:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def run(folder, kind, workers, *callbacks, resume=None):
    torch.set_num_threads(1)
    args = small.config(
        folder,
        max_steps=STEPS,
        logging_steps=LOG,
        save_strategy="steps",
        save_steps=SAVE,
        per_device_train_batch_size=3,  # 8 batches and 4 steps an epoch
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        random_flip=True,
        random_crop_scale=0.5,
        dataloader_num_workers=workers,
        **({"pair_loss_weight": 0.5} if kind == "raw" else small.PAPER) | small.SCALED,
    )
    trainer = IPGTrainer(
        small.vit(dropout=0.2),
        args,
        train_dataset=datasets.Dataset.from_dict({"image": images(22, 0), "label": [i % 2 for i in range(22)]}),
        pair_dataset=pair_sets(kind),
        processing_class=ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE}),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": small.optimizer_state(trainer.model, trainer.optimizer),
        "positions": dict(trainer.progress.positions),
        "history": trainer.state.log_history,
    }


# ---- Its comparison ----


def history(end, resumed_at=None):
    """Log entries without runtimes, and without what transformers itself starts anew at a resume.

    Its `loss` is a mean since the last log line or the resume, whichever is later, and `train_loss` one since the
    resume. So `loss` can be compared in all windows but the one with the resume in it.
    """
    kept = []
    for entry in end["history"]:
        drop = RUNTIME | {"train_loss"}
        if resumed_at is not None and entry["step"] - LOG < resumed_at < entry["step"]:
            drop = drop | {"loss"}
        kept.append({name: value for name, value in entry.items() if name not in drop})
    return kept


def check_equal(whole, resumed, resumed_at):
    for name in ("weights", "optimizer"):
        assert whole[name].keys() == resumed[name].keys() and whole[name]
        assert [key for key in whole[name] if not torch.equal(whole[name][key], resumed[name][key])] == []
    assert whole["positions"] == resumed["positions"] == dict.fromkeys(whole["positions"], STEPS * 4)
    ours, theirs = history(resumed, resumed_at), history(whole, resumed_at)
    assert ours == theirs
    assert sum(entry.get("ipg/loss_scale", 1) != 1 for entry in ours) == STEPS // LOG
    assert sum("loss" in entry for entry in ours) >= STEPS // LOG - 1


def killed(folder, kind, workers, seed):
    """Kills a run at a random moment after its second checkpoint; returns the step of the last whole one."""
    child = Child(folder, run, folder, kind, workers, Slow())
    deadline = time.monotonic() + 120
    while not (folder / f"checkpoint-{2 * SAVE}" / "trainer_state.json").exists():
        if child.poll() is not None or time.monotonic() > deadline:
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail(child.ended(10)[1])
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    os.killpg(child.pid, signal.SIGKILL)
    assert child.ended(60)[0] == -signal.SIGKILL
    return int(newest_checkpoint(folder).rpartition("-")[2])


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Kind -> the folder and the end of a run that nothing interrupts, without workers."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("raw", "own")}
    return {kind: (folder, run(folder, kind, 0)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["raw", "own"])
def test_a_killed_run_resumes_to_the_bit(tmp_path, wholes, kind):
    folder = tmp_path / "killed"
    at = killed(folder, kind, 2, seed=time.time_ns())
    assert 2 * SAVE <= at < STEPS
    # the workers of a stream share its rows out, so that their number changes the order
    whole = wholes["own"][1] if kind == "own" else run(tmp_path / "whole", kind, 2)
    check_equal(whole, run(folder, kind, 2, resume=True), at)


def test_an_inexact_resume_is_seen(tmp_path, wholes):
    """The control: pairs drawn from the start again."""
    checkpoint = tmp_path / f"checkpoint-{2 * SAVE}"
    shutil.copytree(wholes["raw"][0] / checkpoint.name, checkpoint)
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["PairProgress"]["attributes"]["positions"] = {}
    path.write_text(json.dumps(state))
    resumed = run(tmp_path, "raw", 0, resume=str(checkpoint))
    assert small.differences(wholes["raw"][1]["weights"], resumed["weights"]) > 1e-5


# at the start, in the middle and at the end of an epoch (4 steps) and of a log window (3 steps)
@pytest.mark.parametrize(("kind", "step"), [*(("own", step) for step in range(SAVE, STEPS, SAVE)), ("raw", 3 * SAVE)])
def test_every_checkpoint_of_a_run_resumes_to_the_bit(tmp_path, wholes, kind, step):
    folder, whole = wholes[kind]
    check_equal(whole, run(tmp_path, kind, 0, resume=str(folder / f"checkpoint-{step}")), step)


def test_the_number_of_workers_changes_nothing(tmp_path, wholes):
    check_equal(wholes["own"][1], run(tmp_path, "own", 2), None)


@pytest.mark.parametrize("fails", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_whole_checkpoints(tmp_path, wholes, fails):
    source, whole = wholes["own"]
    sizes = {path.name: path.stat().st_size for path in (source / f"checkpoint-{SAVE}").iterdir()}
    assert sizes["optimizer.pt"] > 1.5 * sizes["model.safetensors"]
    folder = tmp_path / "full"
    size = sizes[fails] // 2 if fails == "model.safetensors" else sizes[fails] - 1000
    status, errors = Child(tmp_path, run, folder, "own", 0, FullDisk(size)).ended(120)
    assert status == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("OSError: could not save checkpoint-6, which was removed; those before it are whole.")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == sizes.keys()
    check_equal(whole, run(folder, "own", 0, resume=True), 2 * SAVE)


# ---- Checkpoints ----


def checkpoint(folder, step, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"weight": torch.zeros(1)}, path / "model.safetensors")
    if whole:
        TrainerState().save_to_json(str(path / "trainer_state.json"))
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    with pytest.raises(ValueError, match="No valid checkpoint"):
        newest_checkpoint(tmp_path)
    checkpoint(tmp_path, 2)
    wanted = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 12, whole=False)
    (checkpoint(tmp_path, 14) / "trainer_state.json").write_text('{"epoch": 0.')
    (tmp_path / "checkpoint-mine").mkdir()
    assert newest_checkpoint(tmp_path) == str(wanted)
    passed_over = [record.getMessage() for record in caplog.records]
    assert ["checkpoint-14" in passed_over[0], "checkpoint-12" in passed_over[1], len(passed_over)] == [True, True, 2]


def failure_of(write):
    """What a real attempt to write raises."""
    try:
        write()
    except Exception as failure:
        return failure
    raise AssertionError("it was written")


def beyond_a_limit(write, folder):
    """What writing raises where a file cannot grow; a soft limit, which is lifted again."""
    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        return failure_of(lambda: write(torch.zeros(10_000), folder / "file"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


WRITERS = {
    "safetensors": lambda value, path: save_file({"value": value}, path),
    "torch": lambda value, path: torch.save(value, path),
    "Python": lambda value, path: Path(path).write_bytes(bytes(len(value))),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_disk_is_blamed_for_what_is_the_disks_fault(tmp_path, writer):
    write = WRITERS[writer]
    full = beyond_a_limit(write, tmp_path)
    in_the_way = failure_of(lambda: write(torch.zeros(3), tmp_path))  # a folder
    for failure, wanted, other in (
        (full, "Free disk space", "can be written to"),
        (in_the_way, f"{tmp_path} can be written to", "disk space"),
    ):
        kept, path = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
        with pytest.raises(OSError, match=r"could not save checkpoint-4") as error, whole_or_removed(path):
            assert not (path / "trainer_state.json").exists()  # an older checkpoint no longer counts as whole
            raise failure
        said = str(error.value)
        assert wanted in said and other not in said and " ".join(str(failure).split()) in said and "\n" not in said
        assert error.value.__cause__ is failure
        assert kept.exists() and not path.exists()
        shutil.rmtree(kept)


class Unsavable(ViTImageProcessor):
    def save_pretrained(self, *args, **kwargs):
        raise TypeError("Object of type Path is not JSON serializable")


def test_another_failure_to_save_is_what_it_is(tmp_path):
    size = {"height": small.SIZE, "width": small.SIZE}
    run = small.trainer(tmp_path, processing_class=Unsavable(size=size), save_strategy="steps", save_steps=2)
    with pytest.raises(TypeError, match="not JSON serializable") as error:
        run.train()
    (note,) = error.value.__notes__
    assert note.startswith("could not save checkpoint-2, which was removed") and not [*tmp_path.glob("*checkpoint*")]


def test_a_failure_after_the_save_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "checkpoint-4"
    with pytest.raises(ConnectionError, match="the Hub"), whole_or_removed(path):
        checkpoint(tmp_path, 4)
        raise ConnectionError("the Hub")
    assert path.exists()


def test_a_checkpoint_is_whole_when_all_processes_have_written(tmp_path, monkeypatch, caplog):
    before = checkpoint(tmp_path, 2)
    seen = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: seen.append(newest_checkpoint(tmp_path)))
    with whole_or_removed(tmp_path / "checkpoint-4"):
        path = checkpoint(tmp_path, 4)
    assert seen == [str(before)] and "not written to its end" in caplog.records[0].getMessage()
    assert newest_checkpoint(tmp_path) == str(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_other_processes_remove_nothing(tmp_path):
    path = checkpoint(tmp_path, 4, whole=False)
    with pytest.raises(RuntimeError, match="a fault") as error, whole_or_removed(path, writes=False):
        raise RuntimeError("a fault of this process")
    assert path.exists() and "which a resume will pass over" in error.value.__notes__[0]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_last(path):
    path.write_bytes(path.read_bytes()[:-2])


def hole(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 4] + data[len(data) // 2 :])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path):
    path.write_bytes(b"")


TENSORS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
DAMAGES = [(name, damage) for name in TENSORS for damage in (cut, cut_last, hole, zeroed, emptied, Path.unlink)]
DAMAGES += [(name, damage) for name in ("trainer_state.json", "config.json") for damage in (cut, zeroed, emptied)]


@pytest.fixture(scope="module")
def whole(wholes):
    return wholes["own"]


@pytest.fixture
def saved(tmp_path, whole):
    """Two checkpoints of a run."""
    for step in (8, 10):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def step_of(folder):
    return int(newest_checkpoint(folder).rpartition("-")[2])


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(saved, caplog, name, damage):
    assert step_of(saved) == 10 and not caplog.records
    damage(saved / "checkpoint-10" / name)
    assert step_of(saved) == 8
    (message,) = [record.getMessage() for record in caplog.records]
    part = "the weights are missing" if (name, damage) == ("model.safetensors", Path.unlink) else name
    assert message.startswith(f"{saved / 'checkpoint-10'} is passed over: ") and part in message


def test_a_run_goes_on_from_the_last_whole_checkpoint(saved, whole, caplog):
    shutil.copytree(whole[0] / "checkpoint-6", saved / "checkpoint-6")
    cut(saved / "checkpoint-10" / "optimizer.pt")
    cut(saved / "checkpoint-8" / "model.safetensors")
    check_equal(whole[1], run(saved, "own", 0, resume=True), 6)
    messages = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert ["optimizer.pt" in messages[0], "model.safetensors" in messages[1], len(messages)] == [True, True, 2]


def test_every_checkpoint_damaged(saved):
    cut(saved / "checkpoint-10" / "optimizer.pt")
    emptied(saved / "checkpoint-8" / "trainer_state.json")
    with pytest.raises(
        ValueError, match=r"No valid .*All are damaged .*checkpoint-10: optimizer\.pt.*checkpoint-8: trainer_s"
    ):
        run(saved, "own", 0, resume=True)


def test_checkpoints_of_other_layouts(saved):
    newest = saved / "checkpoint-10"
    for name in ("notes.json", "notes.pt"):
        (newest / name).write_text("a user's own")
    weights = load_file(newest / "model.safetensors")
    (newest / "model.safetensors").unlink()
    for folder in (newest, newest / "mine"):  # adapters
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "adapter_model.safetensors")
        assert step_of(saved) == 10
        cut(folder / "adapter_model.safetensors")
        assert step_of(saved) == 8
        (folder / "adapter_model.safetensors").unlink()
    assert step_of(saved) == 8

    small.vit().save_pretrained(newest, max_shard_size="50KB")
    shard = sorted(newest.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    assert step_of(saved) == 10
    for damage in (cut, Path.unlink):
        damage(shard)
        assert step_of(saved) == 8
        shard.write_bytes(data)
    cut(newest / "model.safetensors.index.json")
    assert step_of(saved) == 8
    (newest / "model.safetensors.index.json").unlink()

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newest / name).unlink()
    assert step_of(saved) == 10  # save_only_model


SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


# ---- Other settings ----

SAVING = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
CHANGED = {
    "seed": 7,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "alpha": 0.5,
    "invariance_threshold": float("inf"),
    "corrective_layers": ["classifier"],
    "correction_schedule": "violated",
}


def resumed_settings(caplog):
    return [r.getMessage() for r in caplog.records if "was trained with other settings" in r.getMessage()]


def test_a_training_that_goes_on_with_other_settings_is_warned_of(tmp_path, caplog):
    first = small.trainer(tmp_path, max_steps=2, **SAVING)
    first.train()
    same = {"save_steps": 1, "logging_steps": 2, "pair_chunk_size": 2, "max_loss_scale": 1.0, "disable_tqdm": False}
    small.trainer(tmp_path / "same", max_steps=4, **{**SAVING, **same}).train(str(tmp_path / "checkpoint-2"))
    assert resumed_settings(caplog) == []
    for name, value in CHANGED.items():
        caplog.clear()
        run = small.trainer(tmp_path / name, max_steps=4, **{**SAVING, name: value})
        run.train(str(tmp_path / "checkpoint-2"))
        (said,) = resumed_settings(caplog)
        assert (
            f"other settings: {name} {getattr(first.args, name)} (now {value}). " in said and run.state.global_step == 4
        )


def test_a_training_that_goes_on_by_another_method_is_warned_of(tmp_path, caplog):
    small.trainer(tmp_path, max_steps=2, **SAVING).train()
    kl = {"kind": PairPenaltyTrainer, "pair_objective": "kl"}
    small.trainer(tmp_path / "kl", max_steps=3, **SAVING, **kl).train(str(tmp_path / "checkpoint-2"))
    assert "pair_objective None (now kl)" in resumed_settings(caplog)[0]


def test_a_training_of_another_method_that_goes_on_with_ours_is_warned_of(tmp_path, caplog):
    kl = {"kind": PairPenaltyTrainer, "pair_objective": "kl"}
    small.trainer(tmp_path, max_steps=2, **SAVING, **kl).train()
    small.trainer(tmp_path / "ipg", max_steps=3, **SAVING).train(str(tmp_path / "checkpoint-2"))
    (said,) = resumed_settings(caplog)
    assert "pair_objective kl (now None)" in said and "alpha" not in said


@pytest.mark.parametrize("count", [6, 9, 8])
def test_a_training_that_goes_on_with_another_number_of_pairs_is_warned_of(tmp_path, caplog, count):
    small.trainer(tmp_path, pair_dataset=small.pairs(8), max_steps=2, **SAVING).train()
    run = small.trainer(tmp_path, pair_dataset=small.pairs(count), max_steps=4, **SAVING)
    run.train(str(tmp_path / "checkpoint-2"))
    said = [r.getMessage() for r in caplog.records if f"has {count} pairs, and had 8" in r.getMessage()]
    assert len(said) == (count != 8)


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        (small.vit, {"optim": "sgd"}, r"checkpoint-2 has the state of optim='adamw_torch.*', which optim='sgd' cannot"),
        (
            lambda: small.vit(3),
            {},
            r"checkpoint-2 is of another model \(size mismatch for classifier.weight.*same model",
        ),
        (small.conv_head, {}, "the checkpoint lacks .* of the model's weights, for example inner"),
    ],
)
def test_what_cannot_go_on_is_an_error(tmp_path, model, settings, expected):
    small.trainer(tmp_path, max_steps=2, **SAVING).train()
    run = small.trainer(tmp_path, model(), max_steps=4, **SAVING, **settings)
    with pytest.raises(ValueError, match=expected) as error:
        run.train(str(tmp_path / "checkpoint-2"))
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_transformers_own_trainer_goes_on_with_a_warning(tmp_path, caplog):
    rows = small.rows(24)
    Trainer(small.resnet(), small.config(tmp_path, **SETTINGS), train_dataset=rows).train()
    trainer = IPGTrainer(
        small.resnet(), small.config(tmp_path, **SETTINGS), train_dataset=rows, pair_dataset=small.pairs(10)
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("no position in the pairs" in record.getMessage() for record in caplog.records)
    assert trainer.progress.positions == {ONLY_SET: 8}
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["PairProgress"]["attributes"]["positions"] == {ONLY_SET: 8}


def test_weights_that_a_checkpoint_lacks_are_an_error(tmp_path):
    """Transformers issue 43701: for ViT its own trainer writes names that it does not read back."""
    Trainer(small.vit(), small.config(tmp_path, **SETTINGS), train_dataset=small.rows(24)).train()
    trainer = IPGTrainer(
        small.vit(), small.config(tmp_path, **SETTINGS), train_dataset=small.rows(24), pair_dataset=small.pairs(10)
    )
    with pytest.raises(ValueError, match=r"lacks 3\d of the model's weights.*from_pretrained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpoints_and_models_load_by_their_names(tmp_path):
    """Checkpoints hold the model's own names, the final model those of the first release; both load whole."""
    trainer = IPGTrainer(
        small.vit(), small.config(tmp_path, **SETTINGS), train_dataset=small.rows(24), pair_dataset=small.pairs(10)
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    weights = trainer.model.state_dict()
    for folder in ("checkpoint-4", "final"):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / folder).state_dict()
        assert small.differences(weights, loaded) == 0
    saved = {name: set(load_file(tmp_path / name / "model.safetensors")) for name in ("checkpoint-4", "final")}
    assert saved["checkpoint-4"] == set(weights) != saved["final"]


def test_the_best_model_is_loaded_whole(tmp_path):
    """It is that of its step, not a mixture with the last."""
    seen = {}

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    trainer = IPGTrainer(
        small.vit(),
        small.config(
            tmp_path,
            **SETTINGS,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="step",
            greater_is_better=False,
        ),
        train_dataset=small.rows(24),
        eval_dataset=small.rows(8),
        pair_dataset=small.pairs(10),
        compute_metrics=lambda _: {"step": trainer.state.global_step},
        callbacks=[Steps()],
    )
    trainer.train()
    assert small.differences(seen[2], trainer.model.state_dict()) == 0
    assert small.differences(seen[4], seen[2]) > 0
