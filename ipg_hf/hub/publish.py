# SPDX-License-Identifier: Apache-2.0
"""Pushes to the Hugging Face Hub without tokens and without pickles, with errors that name the fix."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.image_processing_base import ImageProcessingMixin
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from ..models import TIMM
from ..record import from_json, hub_id, json_values, read_json, trainer_record
from .card import MARKER, model_card

logger = logging.get_logger(__name__)

SETTINGS_NAME = "training_args.json"
# files of an output folder that are not pushed; * matches "/" too
UNPUBLISHED = [
    *("_*", "*/_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"*/{PREFIX_CHECKPOINT_DIR}-*"),
    *("*.bin", "*.pt", "*.pth", "*.pkl"),
]
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors*", "adapter_config.json", "adapter_model*")


# settings of Trainer that a training which goes on should have as it began; Trainer compares the batch size itself
RESUMED = ("seed", "data_seed", "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm")
RESUMED += ("gradient_accumulation_steps", "label_smoothing_factor")
WITHOUT_EFFECT = ("check_pairs", "pair_chunk_size")  # of the settings of our own


class PushError(OSError):
    """A push to the Hub failed; the message names the fix, in one line."""


class PublishingTrainer(Trainer):
    """`Trainer` that pushes neither pickles nor tokens, and finds out before the training whether it can push.

    `training_args.bin`, a pickle that holds `hub_token`, is replaced by `training_args.json`, without tokens. The
    pickles of the optimizer and the scheduler stay in checkpoints, and are pushed only where `hub_strategy` pushes
    checkpoints.

    Attributes:
        run_record: the record of the run, for the model card; `ipg train` sets it.
    """

    run_record: dict[str, Any] | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer.init_hf_repo`.

        Raises:
            PushError: the token cannot write to the repository, or the Hub does not answer.
        """
        if self.is_world_process_zero():
            if hasattr(self.model, "peft_config"):
                warn_of_local_base(self.model)
            check_can_push(self.args, token, private)
        super().init_hf_repo(token, private)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a sharded model is saved whole, whatever the form of its checkpoints."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        self.save_whole(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_whole(self, output_dir: str | None = None) -> None:
        """As `save_model`, without a push. All processes call it."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call=True)
        whole = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=whole)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_adapter = hasattr(model, "peft_config")
        if not isinstance(model, PreTrainedModel) and not is_adapter:
            state_dict = _savable(self.model.state_dict() if state_dict is None else state_dict)
        config = model.config if hasattr(model, "config") else None
        if getattr(config, "model_type", None) == TIMM:  # TimmWrapperConfig would import timm
            config.pretrained_cfg = {**config.pretrained_cfg, **_as_timm(self.processing_class)}
        readme = folder / "README.md"
        card = readme.read_bytes() if is_adapter and readme.is_file() else None
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if is_adapter:  # PEFT writes an empty card, or into the card that is there
            readme.unlink(missing_ok=True) if card is None else readme.write_bytes(card)
            if isinstance(model.get_base_model(), PreTrainedModel):
                model.get_base_model().config.save_pretrained(folder)  # the names of the classes
        write_settings(self.args, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        compare_settings(self.args, resume_from_checkpoint)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as failure:
            if "size mismatch" not in str(failure):
                raise
            first = next(line.strip() for line in str(failure).splitlines() if "size mismatch" in line)
            raise ValueError(
                f"{resume_from_checkpoint} is of another model ({first}): resume with the same model, or begin a new "
                "training in another output_dir."
            ) from failure

    def create_model_card(
        self,
        language: Any = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset: Any = None,
        dataset_args: Any = None,
    ) -> None:
        """Writes the card of [`card.model_card`] as `README.md`, from `run_record` or from what the trainer knows.

        A `README.md` without the line that marks a card of ipg_hf is not changed.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        readme, erm = folder / "README.md", folder / "erm" / "run.json"
        if readme.is_file() and MARKER not in readme.read_text(encoding="utf-8"):
            logger.warning(f"{readme} is not a card of ipg_hf, and is not changed. Remove it to get a card.")
            return
        record = dict(self.run_record or trainer_record(self))
        base = base_of_adapter(self.model)[1] if hasattr(self.model, "peft_config") else None
        record["base_model"] = finetuned_from or hub_id(base) or record["base_model"]
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        metadata = {"language": language, "tags": [tag for tag in tags if tag not in self._tag_names]}
        if dataset_tags:
            metadata["datasets"] = dataset_tags
        if hasattr(self.model, "peft_config"):
            metadata["library_name"] = "peft"
        card = model_card(
            record,
            name=getattr(self, "hub_model_id", None) or self.args.hub_model_id or model_name or folder.resolve().name,
            erm=read_json(erm) if self.run_record and erm.is_file() else None,
            license=license,
            **metadata,
        )
        folder.mkdir(parents=True, exist_ok=True)
        readme.write_text(f"{card}\n", encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`: pushes the output folder, without checkpoints and pickles.

        Raises:
            PushError: the push failed. The run in the output folder is complete, and the message has the command that
                pushes it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_whole()
        if not self.is_world_process_zero():
            return None
        with push_errors(self.args, is_saved=True):
            if self.hub_model_id is None:
                self.init_hf_repo(token, private)
            self.create_model_card(**kwargs)
            self._finish_current_push()
            upload = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
            return self._upload(commit_message, **upload, run_as_future=not blocking)

    def _upload(self, title: str | None, **changes: Any) -> Any:
        """Uploads the output folder without checkpoints and pickles; `changes` are arguments of `upload_folder`."""
        args = self.args
        call = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
        call |= {"folder_path": args.output_dir, "ignore_patterns": UNPUBLISHED, "commit_message": title}
        return hf_api().upload_folder(**(call | changes))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which would push `training_args.bin`."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self._finish_current_push()  # it reads the files that are overwritten here
        self.callback_handler.on_push_begin(args, self.state, self.control)
        for path in (path for pattern in MODEL_FILES for path in Path(checkpoint_folder).glob(pattern)):
            shutil.copy(path, args.output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(args.output_dir)
        write_settings(args, args.output_dir)
        self.create_model_card()
        by_steps = args.save_strategy == SaveStrategy.STEPS
        title = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        title = f"Training in progress, {title}"
        jobs = [self._upload(title, run_as_future=True)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            whole = {"folder_path": checkpoint_folder, "ignore_patterns": None, "run_as_future": True}
            whole["path_in_repo"] = "last-checkpoint" if last else Path(checkpoint_folder).name
            jobs.append(self._upload(f"{title}, checkpoint", **whole))
        for job in jobs:
            job.add_done_callback(_warn_if_failed)
        self.push_in_progress = PushInProgress(jobs)


def write_settings(args: TrainingArguments, folder: str | os.PathLike) -> None:
    """Writes `training_args.json` in place of `training_args.bin`, a pickle that `Trainer` writes and never reads."""
    (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
    settings = json.dumps(_settings(args), indent=2, allow_nan=False)
    (Path(folder) / SETTINGS_NAME).write_text(f"{settings}\n", encoding="utf-8")


def _settings(args: TrainingArguments) -> dict[str, Any]:
    """The settings as JSON has them, without tokens, which `to_dict` hides."""
    return json.loads(json.dumps(json_values(args.to_dict()), default=str))


def compare_settings(args: TrainingArguments, checkpoint: str | os.PathLike) -> None:
    """Warns of settings that were others when a checkpoint was saved; a training may go on longer without a word.

    Raises:
        ValueError: the checkpoint has the state of another optimizer.
    """
    path = Path(checkpoint) / SETTINGS_NAME
    if not path.is_file():  # of another trainer
        return
    before, now = read_json(path), from_json(json.dumps(_settings(args)))
    inherited = {entry.name for entry in fields(TrainingArguments)}
    # of the settings of our own those of another method too, which these settings do not have
    names = [*RESUMED, *(name for name in dict.fromkeys([*now, *before]) if name not in inherited | {*WITHOUT_EFFECT})]
    changed = {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
    optimizers = changed.get("optim", ())
    if optimizers and not all(str(name).startswith("adamw_torch") for name in optimizers):
        raise ValueError(
            f"{checkpoint} has the state of optim={optimizers[0]!r}, which optim={optimizers[1]!r} cannot go on from: "
            "resume with the same optimizer, or begin a new training from the saved weights."
        )
    if changed:
        listed = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        logger.warning(
            f"{checkpoint} was trained with other settings: {listed}. The record and the card will show the present "
            "ones alone, and the learning rate stays that of the checkpoint. Give the settings as they were, or begin "
            "a new training."
        )


def _as_timm(processor: Any) -> dict[str, Any]:
    """The settings of an image processor as timm names them.

    A folder with a timm model is read without the image processor's own file: the processor is made of these settings.
    """
    from transformers import TimmWrapperImageProcessor  # with timm, half a second that others do not wait

    if isinstance(processor, TimmWrapperImageProcessor):
        return {name: list(v) if isinstance(v, tuple) else v for name, v in processor.data_config.items()}
    known = processor.to_dict() if isinstance(processor, ImageProcessingMixin) else {}
    size, crop = known.get("size") or {}, known.get("crop_size") if known.get("do_center_crop") else None
    final = crop or size
    if not final.get("height"):
        return {}  # images of several sizes
    is_normal = known.get("do_normalize", True)
    resampling = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    edge = (size.get("shortest_edge") or size.get("height") or crop["height"]) if crop else final["height"]
    return {
        "input_size": [3, final["height"], final["width"]],
        "crop_pct": final["height"] / edge,
        "crop_mode": "center" if crop else "squash",
        "interpolation": resampling.get(known.get("resample"), "bilinear"),
        "mean": list(known["image_mean"]) if is_normal else [0.0] * 3,
        "std": list(known["image_std"]) if is_normal else [1.0] * 3,
    }


def _savable(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a state as safetensors stores them: contiguous, and a shared one under its first name."""
    kept: dict[Any, str] = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        kept.setdefault(place, name)
    # a part of a kept tensor shares its memory too
    storages = Counter(state[name].untyped_storage().data_ptr() for name in kept.values())
    return {
        name: state[name].clone()
        if storages[state[name].untyped_storage().data_ptr()] > 1
        else state[name].contiguous()
        for name in kept.values()
    }


def base_of_adapter(model: Any) -> tuple[str, str | None]:
    """Name of the first adapter of a PEFT model, and the base model that its `adapter_config.json` names."""
    name, config = next(iter(model.peft_config.items()))
    return name, config.base_model_name_or_path


def warn_of_local_base(model: Any) -> None:
    """Warns if the base model of a PEFT model has no name on the Hub, since nobody else can load the adapter then."""
    name, base = base_of_adapter(model)
    if hub_id(base) is None:
        logger.warning(
            f"The weights that are pushed are an adapter, and adapter_config.json names {base!r} as its base model, "
            "which is no id on the Hub: nobody else can load it. Push the base model, and before this push set "
            f"model.peft_config[{name!r}].base_model_name_or_path to its id; or train and push the whole model."
        )


def hub_name(args: TrainingArguments) -> str:
    """The repository that a run is pushed to: `hub_model_id`, or the output folder's name."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def check_can_push(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> None:
    """Makes the repository of a run if it does not exist, and asks the Hub whether the token may write to it.

    Raises:
        PushError: the token cannot write to the repository, or the Hub does not answer.
    """
    token = token or args.hub_token
    private = args.hub_private_repo if private is None else private
    with push_errors(args):
        repository = hf_api().create_repo(hub_name(args), token=token, private=private, exist_ok=True)
        # create_repo also succeeds for an existing repository of somebody else
        hf_api().auth_check(repository.repo_id, token=token, write=True)


@contextmanager
def push_errors(args: TrainingArguments, is_saved: bool = False) -> Iterator[None]:
    """Raises every exception of the block as a [`PushError`].

    Args:
        args: the settings of the run.
        is_saved: whether the output folder holds the run. The message then has the command that pushes it later.
    """
    try:
        yield
    except Exception as failure:
        message = str(failure) if isinstance(failure, PushError) else f"no push to {hub_name(args)}: {_cause(failure)}"
        if is_saved:
            command = ["hf", "upload", hub_name(args), args.output_dir, "."]
            command += [f"--revision={args.hub_revision}"] if args.hub_revision else []
            command += [f"--exclude={pattern}" for pattern in UNPUBLISHED]
            message += f" The run in {args.output_dir} is complete; push it later by: {shlex.join(command)}"
        raise PushError(message) from failure


def _cause(failure: BaseException) -> str:
    """The reason of a failed push, and the fix."""
    chain = [failure]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    status = next((link.response.status_code for link in chain if isinstance(link, HfHubHTTPError)), None)
    if status == 401:
        return "the Hub does not know the token, or there is none: log in (hf auth login), set HF_TOKEN or hub_token."
    if status in (403, 404):
        return "the token cannot write there: set hub_model_id to a name of your own, or use a token that can."
    if isinstance(failure, ValueError):  # the name of the repository, or the card's metadata
        return " ".join(str(failure).split())
    reason = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())
    return f"the connection to {hf_api().endpoint} failed ({reason}): check the network, then try again."


def _warn_if_failed(job: Future) -> None:
    failure = None if job.cancelled() else job.exception()
    if failure is not None:
        logger.warning(f"A push during training failed; the next push has the same files. {_cause(failure)}")
