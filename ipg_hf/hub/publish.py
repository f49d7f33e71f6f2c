# SPDX-License-Identifier: Apache-2.0
"""Pushes to the Hugging Face Hub that hold no pickles and no tokens, and that fail in plain words."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from .card import write_card

logger = logging.get_logger(__name__)

SETTINGS_NAME = "training_args.json"
# what of an output folder does not go to the Hub; * reaches into folders
UNPUBLISHED = (
    *("_*", "*/_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"*/{PREFIX_CHECKPOINT_DIR}-*"),
    *("*.bin", "*.pt", "*.pth", "*.pkl"),
)
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors*", "adapter_config.json", "adapter_model*")


class PushError(OSError):
    """A push to the Hub that failed; the message says what to do, in one line."""


class PublishingTrainer(Trainer):
    """`Trainer` that pushes an output folder without its pickles, and says at once when it may not push.

    A checkpoint keeps the optimizer's and scheduler's pickles, on the Hub too where `hub_strategy` sends checkpoints.
    `training_args.bin`, which holds `hub_token`, is nowhere: `training_args.json` is there instead, without tokens.

    Attributes:
        run_record: the contents of `run.json`, for the model card; set by `ipg train`.
    """

    run_record: dict[str, Any] | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer.init_hf_repo`.

        Raises:
            PushError: the token may not write there, or the Hub is not reached.
        """
        if self.is_world_process_zero():
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
        """As `save_model`, without a push; called on all processes."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call=True)
        whole = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=whole)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_settings(self.args, output_dir or self.args.output_dir)

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
        """As `Trainer.create_model_card`, by [`model_card.model_card`]: of `run_record` where it is set, else of what
        the trainer knows. `tasks`, `dataset` and `dataset_args` come from there."""
        if self.is_world_process_zero():
            given = {"language": language, "license": license, "tags": tags, "dataset_tags": dataset_tags}
            write_card(self, self.run_record, model_name=model_name, finetuned_from=finetuned_from, **given)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`: the output folder, without checkpoints and without any pickle.

        Raises:
            PushError: it failed; the run in the output folder is whole, and the message says how to push it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        args = self.args
        token, revision = token or args.hub_token, revision or args.hub_revision
        self.save_whole()
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            with push_errors(args, kept=True):
                self.init_hf_repo(token, private)
        model_tags = list(getattr(self.model, "model_tags", None) or [])
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        kwargs.setdefault("model_name", hub_name(args).split("/")[-1])
        self.create_model_card(tags=[*tags, *(tag for tag in model_tags if tag not in tags)], **kwargs)
        self._finish_current_push()
        with push_errors(args, kept=True):
            return hf_api().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=args.output_dir,
                commit_message=commit_message,
                token=token,
                run_as_future=not blocking,
                ignore_patterns=list(UNPUBLISHED),
                revision=revision,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, whose own writes `training_args.bin` into the folder that it sends."""
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
        common = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
        common |= {"run_as_future": True, "commit_message": f"Training in progress, {title}"}
        jobs = [hf_api().upload_folder(folder_path=args.output_dir, ignore_patterns=list(UNPUBLISHED), **common)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            common["path_in_repo"] = "last-checkpoint" if last else Path(checkpoint_folder).name
            common["commit_message"] += ", checkpoint"
            jobs.append(hf_api().upload_folder(folder_path=checkpoint_folder, **common))
        for job in jobs:
            job.add_done_callback(_warn_if_failed)
        self.push_in_progress = PushInProgress(jobs)


def write_settings(args: TrainingArguments, folder: str | os.PathLike) -> None:
    """Writes `training_args.json` in place of `training_args.bin`, a pickle that `Trainer` writes and never reads."""
    (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
    settings = json.dumps(args.to_dict(), indent=2, default=str)  # to_dict hides tokens
    (Path(folder) / SETTINGS_NAME).write_text(f"{settings}\n", encoding="utf-8")


def hub_name(args: TrainingArguments) -> str:
    """The repository that a run is pushed to: `hub_model_id`, or the output folder's name."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def check_can_push(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> None:
    """Makes the repository of a run where there is none, and asks the Hub whether the token may write to it.

    Raises:
        PushError: it may not, or the Hub is not reached.
    """
    token = token or args.hub_token
    private = args.hub_private_repo if private is None else private
    with push_errors(args):
        repository = hf_api().create_repo(hub_name(args), token=token, private=private, exist_ok=True)
        # creating also succeeds for a public repository of somebody else's
        hf_api().auth_check(repository.repo_id, token=token, write=True)


@contextmanager
def push_errors(args: TrainingArguments, kept: bool = False) -> Iterator[None]:
    """Raises whatever goes wrong in the block as a [`PushError`].

    Args:
        args: of the run.
        kept: whether there is a run in the output folder; the message then says how to push it later.
    """
    try:
        yield
    except Exception as failure:
        message = str(failure) if isinstance(failure, PushError) else f"no push to {hub_name(args)}: {_cause(failure)}"
        if kept:
            command = ["hf", "upload", hub_name(args), args.output_dir, "."]
            command += [f"--revision={args.hub_revision}"] if args.hub_revision else []
            command += [f"--exclude={pattern}" for pattern in UNPUBLISHED]
            message += f" The run in {args.output_dir} is whole; push it later by: {shlex.join(command)}"
        raise PushError(message) from failure


def _cause(failure: BaseException) -> str:
    chain = [failure]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    status = next((link.response.status_code for link in chain if isinstance(link, HfHubHTTPError)), None)
    if status == 401:
        return "the Hub does not know the token, or there is none: log in (hf auth login), set HF_TOKEN or hub_token."
    if status in (403, 404):
        return "the token may not write there: set hub_model_id to a name of your own, or use a token that may."
    if isinstance(failure, ValueError):  # the card's metadata
        return " ".join(str(failure).split())
    reason = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())
    return f"the connection to {hf_api().endpoint} failed ({reason}): look at the network, then try again."


def _warn_if_failed(job: Future) -> None:
    failure = None if job.cancelled() else job.exception()
    if failure is not None:
        logger.warning(f"A push during training failed; the next holds what it held. The cause: {_cause(failure)}")
