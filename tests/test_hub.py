# SPDX-License-Identifier: Apache-2.0
"""Pushes to a Hub and loads from it, against the one of `hub_server`.

The clients run in processes of their own, as their libraries read `HF_ENDPOINT` and `HF_HOME` when they are imported:
this file is their script too.
"""

import ast
import contextlib
import hashlib
import http.client
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
import yaml
from hub_server import Hub, serving
from transformers import Trainer

from ipg_hf import IPGConfig, IPGTrainer

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    **small.TINY_RECIPE,
    "max_steps": 4,
    "per_device_eval_batch_size": 500,
    "logging_steps": 2,
    "save_steps": 2,
    "push_to_hub": True,
}
BY_ENVIRONMENT, BY_FLAG, BY_FILE, EXPIRING = (
    f"hf_{name}Planted" for name in ("environment", "flag", "recipe", "expiring")
)
PUSHED = {
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "run.json",
    "training_curves.png",
    "training_args.json",
    "trainer_state.json",
}
PICKLES = re.compile(r"\.(bin|pt|pth|pkl)$")


# ---- What runs in the clients ----


def read_back(name, here, untrained, folder):
    """What a loaded model, processor and pipeline give beside the ones that were pushed."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    from ipg_hf.data import load_digits

    there = AutoModelForImageClassification.from_pretrained(name).eval()
    image = load_digits().test[0]["image"]
    logits = []
    for model, source in ((here.eval(), folder), (there, name), (untrained.eval(), folder)):
        pixels = AutoImageProcessor.from_pretrained(source)(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits.append(model(pixels).logits[0])
    scores = {answer["label"]: answer["score"] for answer in pipeline("image-classification", model=name)(image)}
    expected = {here.config.id2label[i]: value for i, value in enumerate(logits[0].softmax(-1).tolist())}
    return {
        "weights": small.bit_equal(small.weights(here), small.weights(there)),
        "logits": torch.equal(logits[0], logits[1]),
        "pipeline": max(abs(scores[label] - expected[label]) for label in expected),
        "control": torch.equal(logits[0], logits[2]),
    }


def publish_by_trainer(folder):
    """Pushes by every strategy, and loads again what was pushed."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForImageClassification, TimmWrapperImageProcessor, ViTImageProcessor

    from ipg_hf.hub.publish import PushError
    from ipg_hf.pairs import AdversarialPairs

    processor = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})

    def trained(name, model=None, resume=None, **settings):
        given = {"max_steps": 4, "lr_scheduler_type": "constant", "learning_rate": 1e-3, **settings}
        given = {"save_strategy": "steps", "save_steps": 2, "processing_class": processor, **given}
        run = small.trainer(folder / name, model, hub_model_id=f"me/{name}", hub_always_push=True, **given)
        run.train(resume_from_checkpoint=resume)
        return run

    end = trained("end", push_to_hub=True, hub_strategy="end")
    (folder / "end" / "erm" / "checkpoint-2").mkdir(parents=True)  # as the twin of a recipe leaves them
    torch.save({}, folder / "end" / "erm" / "checkpoint-2" / "optimizer.pt")
    torch.save({}, folder / "end" / "mine.bin")
    for _ in range(2):
        end.push_to_hub()
    trained("saved", push_to_hub=True, hub_strategy="end").save_model()
    trained("asked", save_strategy="no", hub_token=BY_FLAG).push_to_hub(commit_message="at last", tags="digits")

    every_save = trained("every_save", push_to_hub=True)
    interim = AutoModelForImageClassification.from_pretrained("me/every_save")

    images = AdversarialPairs(small.images(16), steps=1, every=3)
    trained("checkpoint", push_to_hub=True, hub_strategy="checkpoint", pair_dataset=images)
    hubs = snapshot_download("me/checkpoint")
    sources = [f"{hubs}/last-checkpoint", str(folder / "checkpoint" / "checkpoint-4")]
    ends = [trained("on", resume=source, max_steps=6, save_strategy="no", pair_dataset=images) for source in sources]

    model = small.timm_resnet()
    timms = TimmWrapperImageProcessor(model.config.pretrained_cfg)
    wrapped = trained("timm", model, push_to_hub=True, hub_strategy="end", processing_class=timms)
    wrapped.push_to_hub()
    refused = ""
    try:
        trained("refused", push_to_hub=True, hub_token="hf_wrong")
    except PushError as failure:
        refused = str(failure)
    return {
        "end": read_back("me/end", end.model, small.vit(), folder / "end"),
        "timm": read_back("me/timm", wrapped.model, small.timm_resnet(), folder / "timm"),
        "interim": small.bit_equal(small.weights(interim), small.weights(every_save.model)),
        "resumed": small.bit_equal(*(small.weights(run.model) for run in ends)),
        "went_on": not small.bit_equal(small.weights(ends[0].model), small.weights(small.vit())),
        "refused": refused,
    }


def train_by_command(folder):
    """Status and output of each command: the first is as it should be, the rest meet what goes wrong."""
    from huggingface_hub.utils import _http
    from transformers.utils.hub import hf_api

    from ipg_hf.cli import main

    _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # between the tries of an upload
    secret = folder / "secret.yaml"
    secret.write_text(yaml.safe_dump({**TINY, "hub_token": BY_FILE}))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    calls = {
        "good": [recipe, "--hub_model_id=me/good", f"--hub_token={BY_FLAG}", "--compare=erm"],
        "wrong": [recipe, "--hub_model_id=me/good", "--hub_token=hf_wrong", "--overwrite_output_dir=true"],
        "theirs": [recipe, "--hub_model_id=other/new"],
        "taken": [recipe, "--hub_model_id=other/taken"],
        "name": [recipe, "--hub_model_id=me/a/b"],
        # always: whether the first push is over by the second save is a matter of time, and then there is one warning
        "cut": [secret, "--hub_model_id=me/cut", "--hub_always_push=true"],
        "expired": [recipe, "--hub_model_id=me/expired", f"--hub_token={EXPIRING}", "--hub_strategy=end"],
    }
    found = {}
    for name, (config, *flags) in calls.items():
        output = folder / ("good" if name == "wrong" else name)
        found[name] = said(main, ["train", "--config", str(config), f"--output_dir={output}", *flags])
    hf_api().endpoint, endpoint = "http://127.0.0.1:9", hf_api().endpoint  # where nothing answers
    found["down"] = said(main, ["train", "--config", str(recipe), f"--output_dir={folder / 'down'}"])
    hf_api().endpoint = endpoint
    found["evaluate"] = said(main, ["evaluate", str(folder / "good"), "--config", str(recipe)])
    return found


def said(main, words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(words)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def share_pairs(folder):
    """Pair sets and odd names, there and back."""
    from datasets import load_dataset
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    from ipg_hf.data import load_digits

    pairs, other = (load_digits(num_pairs=30, seed=seed).pairs for seed in (0, 1))
    pairs.push_to_hub("me/pairs")
    loaded = load_dataset("me/pairs", split="train")
    rows = [rows.with_format("arrow")[:].to_pydict() for rows in (pairs, loaded, other)]
    found = {"features": pairs.features == loaded.features, "rows": rows[0] == rows[1], "control": rows[0] == rows[2]}

    api = HfApi()
    api.create_repo("me/odd")
    api.create_branch("me/odd", branch="a/b")
    for path, content in {"c d/%2F.txt": b"small", "c d/e.pt": b"large" * 99}.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="me/odd", revision="a/b")
    paths = ["c d/%2F.txt", "c d/e.pt"]
    found["read"] = [Path(hf_hub_download("me/odd", path, revision="a/b")).read_bytes().decode() for path in paths]
    found["infos"] = [info.size for info in api.get_paths_info("me/odd", paths, revision="a/b")]
    found["tree"] = sorted(item.path for item in api.list_repo_tree("me/odd", revision="a/b", recursive=True))
    stale = api.model_info("me/odd", revision="a/b").sha
    api.upload_file(path_or_fileobj=b"more", path_in_repo="more", repo_id="me/odd", revision="a/b")
    asked = {
        "repo": lambda: hf_hub_download("me/none", "x"),
        "revision": lambda: hf_hub_download("me/odd", "x", revision="none"),
        "entry": lambda: hf_hub_download("me/odd", "x"),
        "exists": lambda: api.create_repo("me/odd"),
        "stale": lambda: api.create_commit(
            "me/odd", [CommitOperationAdd("y", b"")], commit_message="y", revision="a/b", parent_commit=stale
        ),
    }
    for name, ask in asked.items():
        try:
            ask()
        except HfHubHTTPError as failure:
            found[name] = [type(failure).__name__, failure.response.status_code]
    found["whoami"] = api.whoami()["name"]
    return found


# ---- The server's side ----


@dataclass
class Done:
    """A client that has ended, its folder and its answer."""

    folder: Path
    answer: dict
    output: str


@pytest.fixture(scope="module")
def hub():
    tokens = {BY_ENVIRONMENT: "me", BY_FLAG: "me", BY_FILE: "me", EXPIRING: "me"}
    hub = Hub(tokens)
    hub.add_repo("model", "other/taken")
    hub.cuts.update({"me/cut": 10**6, "me/good": 1})
    hub.expiring.add(EXPIRING)
    with serving(hub) as hub.endpoint:
        yield hub


def called(hub, folder, words):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": BY_ENVIRONMENT,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def clients(hub, tmp_path_factory):
    """One process for all, as the imports take most of the time."""
    folder = tmp_path_factory.mktemp("clients")
    done = called(hub, folder, [__file__, folder])
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((folder / "answers.json").read_text())
    return {
        name: Done(folder / name, answer, f"{done.stdout}{done.stderr}{answer}") for name, answer in answers.items()
    }


@pytest.fixture(scope="module")
def by_trainer(clients):
    return clients["publish_by_trainer"]


@pytest.fixture(scope="module")
def by_command(clients):
    return clients["train_by_command"]


@pytest.fixture(scope="module")
def by_pairs(clients):
    return clients["share_pairs"]


def local(folder):
    """Path -> bytes of what a run's folder has for the Hub."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not any(part.startswith(("checkpoint-", "_")) for part in name.split("/")) and not PICKLES.search(name)
    }


def remote(hub, repo):
    files = hub.repos["model", repo].files
    del files[".gitattributes"]
    return files


# ---- 1: the server ----


def test_the_server_answers_as_the_clients_expect(by_pairs):
    found = by_pairs.answer
    assert found["read"] == ["small", "large" * 99] and found["infos"] == [5, 495]
    assert found["tree"] == [".gitattributes", "c d", "c d/%2F.txt", "c d/e.pt"]
    assert found["repo"] == ["RepositoryNotFoundError", 404]
    assert found["revision"] == ["RevisionNotFoundError", 404]
    assert found["entry"] == ["RemoteEntryNotFoundError", 404]
    assert found["exists"] == ["HfHubHTTPError", 409] and found["stale"] == ["HfHubHTTPError", 412]
    assert found["whoami"] == "me"


def test_the_server_sends_ranges_and_names_large_files(hub, by_pairs):
    url = f"{hub.endpoint}/me/odd/resolve/a%2Fb/c%20d/"
    with urllib.request.urlopen(urllib.request.Request(f"{url}%252F.txt", headers={"Range": "bytes=1-3"})) as answer:
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"mal", "bytes 1-3/5")
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    connection.request("HEAD", "/me/odd/resolve/a%2Fb/c%20d/e.pt")
    answer = connection.getresponse()
    oid = hashlib.sha256(b"large" * 99).hexdigest()
    assert answer.status == 302 and answer.headers["X-Linked-Etag"] == f'"{oid}"'
    assert answer.headers["X-Linked-Size"] == "495" and answer.headers["Location"].endswith(f"/cdn/{oid}")
    assert answer.headers["X-Repo-Commit"] == hub.repos["model", "me/odd"].branches["a/b"].oid


# ---- 2: pushes ----


def test_the_folder_is_pushed_as_it_is(hub, by_trainer):
    for name in ("end", "saved", "asked", "timm"):
        assert remote(hub, f"me/{name}") == local(by_trainer.folder / name), name
    assert hub.repos["model", "me/saved"].titles == ["Model save"]
    assert hub.repos["model", "me/asked"].titles == ["at last"]
    files = remote(hub, "me/end")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= files.keys()
    assert "ipg" in files["README.md"].decode() and "digits" in remote(hub, "me/asked")["README.md"].decode()


def test_every_save_is_pushed_while_the_run_goes_on(hub, by_trainer):
    repository = hub.repos["model", "me/every_save"]
    assert repository.titles == ["Training in progress, step 2", "Training in progress, step 4"]
    for commit, step in zip(repository.commits[1:], (2, 4), strict=True):
        saved = (by_trainer.folder / "every_save" / f"checkpoint-{step}" / "model.safetensors").read_bytes()
        assert commit.files["model.safetensors"].content == saved
        card = commit.files["README.md"].content.decode()
        assert "# every_save" in card and f"Optimizer steps: {step};" in card
    assert len({commit.files["model.safetensors"].oid for commit in repository.commits[1:]}) == 2
    assert by_trainer.answer["interim"]


def test_the_last_checkpoint_is_pushed_whole_and_goes_on(hub, by_trainer):
    repository = hub.repos["model", "me/checkpoint"]
    steps = [f"Training in progress, step {number}" for number in (2, 4)]
    assert repository.titles == [title for step in steps for title in (step, f"{step}, checkpoint")]
    folder = by_trainer.folder / "checkpoint" / "checkpoint-4"
    saved = {f"last-checkpoint/{path.name}": path.read_bytes() for path in folder.iterdir()}
    pushed = {name: content for name, content in remote(hub, "me/checkpoint").items() if "/" in name}
    assert pushed == saved
    names = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "adversarial_pairs_0.safetensors", "training_args.json"}
    assert names <= {path.name for path in folder.iterdir()}
    assert by_trainer.answer["resumed"] and by_trainer.answer["went_on"]


def test_the_command_pushes_the_finished_run_in_one_last_commit(hub, by_command):
    done = by_command.answer["good"]
    assert done["status"] == 0 and f"pushed to {hub.endpoint}/me/good" in done["out"], done["err"]
    repository = hub.repos["model", "me/good"]
    assert repository.titles[-1] == "End of training"
    assert all(title.startswith("Training in progress") for title in repository.titles[:-1])
    assert not any("run.json" in commit.files for commit in repository.commits[:-1])
    files = remote(hub, "me/good")
    assert files.keys() >= PUSHED and files == local(by_command.folder / "good")
    assert json.loads(files["run.json"])["method"] == "ipg" and json.loads(files["erm/run.json"])["method"] == "erm"
    assert files["model.safetensors"] != files["erm/model.safetensors"]


def test_measuring_makes_no_repository(hub, by_command):
    assert by_command.answer["evaluate"]["status"] == 0
    mine = {repo for kind, repo in hub.repos if kind == "model"}
    assert mine <= {
        "other/taken",
        *(f"me/{name}" for name in ("good", "cut", "expired", "odd", "end", "saved", "asked", "timm")),
        *(f"me/{name}" for name in ("every_save", "checkpoint")),
    }


def test_what_the_pushes_rest_on():
    def parameters(function):
        return list(inspect.signature(function).parameters)

    for name in ("init_hf_repo", "save_model", "_save", "create_model_card", "push_to_hub", "_push_from_checkpoint"):
        assert parameters(getattr(IPGTrainer, name)) == parameters(getattr(Trainer, name)), name
    source = inspect.getsource(inspect.getmodule(Trainer))
    # written twice and never read: what resumes goes without it
    assert re.findall(r".*TRAINING_ARGS_NAME.*", source) == [
        'TRAINING_ARGS_NAME = "training_args.bin"',
        *["        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))"] * 2,
    ]


# ---- 3: back from the Hub ----


@pytest.mark.parametrize("name", ["end", "timm"])
def test_what_was_pushed_loads_as_it_was(by_trainer, name):
    found = by_trainer.answer[name]
    assert found["weights"] and found["logits"] and found["pipeline"] < 1e-6
    assert not found["control"]


def test_pairs_come_back_equal(by_pairs):
    assert by_pairs.answer["features"] and by_pairs.answer["rows"] and not by_pairs.answer["control"]


# ---- 4: again, and what goes wrong ----


def test_a_second_push_adds_no_commit(hub, by_trainer):
    assert hub.repos["model", "me/end"].titles == ["End of training"]


def whole(folder):
    """Whether a run's folder holds what it should, and nothing half-written."""
    from safetensors.torch import load_file

    assert load_file(folder / "model.safetensors")
    assert json.loads((folder / "run.json").read_text())["steps"] == 4
    return {path.name for path in folder.iterdir()} >= PUSHED


def one_line(done, warnings=0):
    *warned, error = done["err"].splitlines()
    assert done["status"] == 2 and error.startswith("ipg train: error: no push to ")
    assert len(warned) == warnings and all(line.startswith("A push during training failed") for line in warned)
    return error


def test_who_may_not_push_hears_it_before_training(hub, by_command):
    names = ("wrong", "theirs", "taken", "name", "down")
    wrong, theirs, taken, name, down = (one_line(by_command.answer[name]) for name in names)
    assert "me/good" in wrong and "HF_TOKEN" in wrong and "hf auth login" in wrong
    assert "other/new" in theirs and "hub_model_id" in theirs
    assert "other/taken" in taken and "hub_model_id" in taken
    assert "me/a/b" in name and "namespace/repo_name" in name
    assert ("model", "other/new") not in hub.repos and hub.repos["model", "other/taken"].titles == []
    assert whole(by_command.folder / "good")  # though it was to be overwritten
    assert "http://127.0.0.1:9" in down and "network" in down
    assert not any((by_command.folder / name).exists() for name in names[1:])


def test_the_trainer_says_it_too(by_trainer):
    assert by_trainer.answer["refused"].startswith("no push to me/refused: ")
    assert "HF_TOKEN" in by_trainer.answer["refused"]


@pytest.mark.parametrize(("name", "cause"), [("cut", "the connection to http"), ("expired", "hf auth login")])
def test_a_run_whose_push_fails_is_whole_and_is_pushed_later(hub, by_command, name, cause):
    message = one_line(by_command.answer[name], warnings=2 if name == "cut" else 0)
    folder = by_command.folder / name
    assert cause in message and str(folder) in message and "worst group" in by_command.answer[name]["out"]
    assert whole(folder)
    assert "End of training" not in hub.repos["model", f"me/{name}"].titles
    hub.cuts.pop(f"me/{name}", None)
    command = shlex.split(message.split("push it later by: ")[1])
    for _ in range(2):
        again = called(hub, by_command.folder, ["-m", "huggingface_hub.cli.hf", *command[1:]])
        assert again.returncode == 0, again.stderr
    assert command[0] == "hf" and remote(hub, f"me/{name}") == local(folder)
    assert len(hub.repos["model", f"me/{name}"].titles) == 1


def test_an_upload_that_breaks_off_once_is_tried_again(hub, by_command):
    assert by_command.answer["good"]["status"] == 0 and hub.cuts["me/good"] == 0


# ---- 5: secrets and code ----


def secrets_in(contents):
    """Names of the contents that hold a planted token."""
    tokens = [token.encode() for token in (BY_ENVIRONMENT, BY_FLAG, BY_FILE, EXPIRING)]
    return [name for name, content in contents if any(token in content for token in tokens)]


def test_no_token_and_no_pickle_is_anywhere(hub, by_trainer, by_command, tmp_path):
    for done in (by_trainer, by_command):
        files = [path for path in done.folder.rglob("*") if path.is_file()]
        assert len(files) > 30
        mine = {done.folder / "secret.yaml"}  # the recipe that holds one
        assert secrets_in((path, path.read_bytes()) for path in files if path not in mine) == []
        assert not [path for path in files if path.name == "training_args.bin"]
        assert secrets_in([("output", done.output.encode())]) == []
    pushed = [
        (f"{repo}/{path}", blob.content)
        for (_, repo), repository in hub.repos.items()
        for commit in repository.commits
        for path, blob in commit.files.items()
    ]
    pushed += list(hub.large.items())
    assert len(pushed) > 100 and secrets_in(pushed) == []
    pickled = {name for name, _ in pushed if PICKLES.search(name) and "/odd/" not in name}
    assert pickled and all(name.startswith("me/checkpoint/last-checkpoint/") for name in pickled)

    torch.save(IPGConfig(str(tmp_path), hub_token=BY_FLAG, report_to="none"), tmp_path / "training_args.bin")
    assert secrets_in([("control", (tmp_path / "training_args.bin").read_bytes())]) == ["control"]


def test_the_settings_are_there_without_their_tokens(by_command):
    settings = json.loads((by_command.folder / "good" / "training_args.json").read_text())
    assert settings["hub_token"] == "<HUB_TOKEN>" and settings["learning_rate"] == 1e-3 and settings["alpha"] == 1.0
    config = json.loads((by_command.folder / "cut" / "run.json").read_text())["config"]
    assert "hub_token" not in config and config["hub_model_id"] == "me/cut"


def unsafe(code):
    """Lines that would run what a file holds."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "joblib", "marshal"}:
                yield node.lineno
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if words.get("trust_remote_code") or words.get("allow_pickle") or called in ("eval", "exec"):
            yield node.lineno
        if called == "torch.load" and words.get("weights_only") is not True:
            yield node.lineno


def test_nothing_of_ours_runs_what_it_loads():
    for path in sorted([*(ROOT / "ipg_hf").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]):
        assert list(unsafe(path.read_text())) == [], path
    bad = ["import pickle", "from pickle import load", "torch.load(f)", "torch.load(f, weights_only=False)"]
    bad += ["from_pretrained(f, trust_remote_code=True)", "np.load(f, allow_pickle=True)", "eval(f)"]
    assert all(list(unsafe(line)) == [1] for line in bad)
    assert not list(unsafe("torch.load(f, weights_only=True)"))


# ---- 6: TensorBoard ----


def test_the_logs_reach_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = small.trainer(tmp_path, report_to="tensorboard", max_steps=3, hub_token=BY_FLAG)
    run.train()
    assert secrets_in((path, path.read_bytes()) for path in (tmp_path / "events").rglob("*") if path.is_file()) == []
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    logged = small.logged(run)
    assert len(logged) == 3
    keys = {key for key in logged[0] if key.startswith("ipg/")}
    assert keys >= {"ipg/distance", "ipg/divergence", "ipg/violated", "ipg/loss_scale"}
    for key in keys:
        values = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert values == {entry["step"]: pytest.approx(entry[key], rel=1e-6) for entry in logged}, key


if __name__ == "__main__":
    answers = {}
    for task in (publish_by_trainer, train_by_command, share_pairs):
        (Path(sys.argv[1]) / task.__name__).mkdir()
        started = time.monotonic()
        answers[task.__name__] = task(Path(sys.argv[1]) / task.__name__)
        print(task.__name__, time.monotonic() - started)
    (Path(sys.argv[1]) / "answers.json").write_text(json.dumps(answers))
