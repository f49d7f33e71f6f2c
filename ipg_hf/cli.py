# SPDX-License-Identifier: Apache-2.0
"""The command line: `ipg train`, `ipg evaluate`, `ipg pairs`, `ipg scan`, `ipg bench`, `ipg card` and `ipg heads`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

# after an interrupt
GO_ON = {
    "train": " Where it had saved a checkpoint, go on from the last by the same command and "
    "--resume_from_checkpoint last",
    "scan": " The same command goes on, unless the model has code of its own.",
    "bench": " Finished runs are kept: the same command goes on.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for bad pairs, 2 for a usage error, 130 for an interrupt."""
    parser, commands = _parser()
    options, flags = parser.parse_known_args(argv)
    if options.command in ("heads", "card", "bench", "scan") and flags:
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(flags)}")
    path = getattr(options, "config", None) or getattr(options, "suite", None)
    if path and not os.path.exists(path):  # said at once
        print(f"ipg {options.command}: error: {path}: no such file.", file=sys.stderr)
        return 2
    # a waiting thread of GNU OpenMP, which torch has on Linux, spins 30 times as long by default: beside busy processes
    # a training then takes twice as long (recipes/speed). torch reads it when it is imported; no number depends on it
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        from .commands import run  # with torch and transformers, seconds that --help and a wrong command do not wait

        status = run(options, flags)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's last flush would fail too
        return 1
    except KeyboardInterrupt:
        print(f"\nipg {options.command}: interrupted.{GO_ON.get(options.command, '')}", file=sys.stderr)
        return 130
    return status


class _CommandParser(argparse.ArgumentParser):
    """The parser of a command; `with_settings`, its help lists all settings of a recipe."""

    def __init__(self, *args: Any, with_settings: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.with_settings = with_settings

    def format_help(self) -> str:
        if self.with_settings:
            from .recipe import settings_help  # with transformers, seconds that only this help waits for

            self.epilog = settings_help()
        return super().format_help()


def _parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    """The parser, and that of its commands."""
    parser = argparse.ArgumentParser(
        prog="ipg",
        description="Train image classifiers that ignore a spurious attribute, from pairs of images.",
        epilog="Every setting of a recipe is a flag too: --key value wins over the file.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_CommandParser)
    texts = {
        "train": "train by a recipe",
        "evaluate": "measure a model on a recipe's data",
        "pairs": "check or show a recipe's training pairs",
    }
    for name, text in texts.items():
        command = commands.add_parser(
            name, help=text, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter, with_settings=True
        )
        if name == "evaluate":
            command.add_argument("model", help="a folder made by ipg train, or any Hub id")
            command.add_argument("--split", choices=["validation", "test"], default="test")
            command.add_argument("--against", metavar="OTHER", help="with --report: a second model to stand beside it")
            written = command.add_mutually_exclusive_group()
            written.add_argument("--output", help="write the metrics to this new JSON file")
            written.add_argument(
                "--report", metavar="DIR", help="write an audit to this folder: a page and its numbers"
            )
        if name == "pairs":
            command.add_argument("action", choices=["check", "preview"])
            command.add_argument("--model", help="a folder or Hub id, whose divergence on each pair is measured")
            command.add_argument(
                "--output",
                help="check: write the findings to this new JSON file; preview: name of the new page [pairs]",
            )
            command.add_argument("--shown", type=int, default=24, help="pairs that a preview shows [24]")
        command.add_argument("--config", required=True, help="the recipe, a YAML file")
    heads = commands.add_parser("heads", help="show which classifier head is found in which model", allow_abbrev=False)
    heads.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="timm/NAME or a class of transformers, also with wildcards ('timm/vit_*', '*Swin*'), a folder or Hub id; "
        "without any, every class of transformers and every model of timm (minutes). Weights are random; of a Hub id "
        "only the config is fetched. A wildcard of timm proves which layers reach the logits, a name the numbers too.",
    )
    _add_scan(commands)
    card = commands.add_parser("card", help="print the model card of a run", allow_abbrev=False)
    card.add_argument("run", help="a folder made by ipg train; the run in its folder erm is compared with it")
    card.add_argument("--name", help="of the model, a Hub id or a word; by default the folder's name")
    card.add_argument("--license", help="of the model, as the Hub spells it, e.g. apache-2.0")
    _add_bench(commands)
    return parser, commands


def _add_scan(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "scan", help="find which parts of the images a model follows; no attribute is needed", allow_abbrev=False
    )
    command.add_argument("model", help="a folder or Hub id")
    command.add_argument("--data", required=True, help="a folder of images or of a data set, or a Hub id")
    command.add_argument("--split", help="by default test, or else validation, or else train")
    command.add_argument("--mask", metavar="COLUMN", help="column of masks of the objects, to exchange backgrounds too")
    command.add_argument(
        "--segmenter", metavar="MODEL", help="make masks by this model, a folder or Hub id; --mask names them"
    )
    command.add_argument("--num_images", type=int, default=300, help="number of images to scan, at least 20 [300]")
    command.add_argument("--seed", type=int, default=0, help="seed of the draws [0]")
    command.add_argument("--report", metavar="DIR", help="write a page with pictures and the numbers to this folder")
    command.add_argument(
        "--before", metavar="DIR", help="folder of an earlier scan's report: its effects are shown too"
    )
    command.add_argument(
        "--write_recipe", metavar="FILE", help="write a recipe that trains against the first strong finding"
    )


def _add_bench(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "bench", help="compare methods over seeds, by a suite; goes on where it stopped", allow_abbrev=False
    )
    command.add_argument("suite", help="a YAML file, see recipes/suites")
    command.add_argument("--methods", nargs="+", metavar="NAME", help="run only these of the suite's methods")
    command.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run only these of the suite's seeds")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each if more than one [1]")
    command.add_argument("--only", choices=["tune", "run", "render"], help="one of the three stages")
    command.add_argument("--output_dir", help="where runs work [outputs/bench-SUITE]")
    command.add_argument("--keep_models", action="store_true", help="keep what each run leaves in the output folder")


if __name__ == "__main__":
    status = main()
    torch = sys.modules.get("torch")  # which is not there if the command was interrupted before
    if torch and torch.distributed.is_initialized():
        # gloo's threads now and then abort the interpreter's orderly end ("terminate called without an active
        # exception", torch 2.15 on CPU), which a launcher takes for a failed run
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
