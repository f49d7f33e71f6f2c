# SPDX-License-Identifier: Apache-2.0
"""What choosing the checkpoint without group labels loses: makes the runs; `page_tables.py` makes the table.

Launch: python recipes/scripts/checkpoints.py RECIPE ... [--seeds 0 1 2 3 4]

One training, several choices. A fifth of the training pairs is held out, as where a user has no other pairs, and the
test set is measured at every checkpoint that a rule chooses. A record is the run `<recipe>-seed<n>` in
`recipes/records/checkpoints_<dataset>.jsonl`: that of the training, with `choices`. What has a record is not run again.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import seeds

from ipg_hf.data.benchmark import Benchmark
from ipg_hf.metrics import is_higher_better
from ipg_hf.pairs.held_out import hold_out_pairs
from ipg_hf.record import read_json
from ipg_hf.run import evaluate

# from_validation: pairs of all images of the validation set; from_training: the fifth of the training pairs
PAIR_ACCURACY = "from_training/pair_accuracy"
RULES = (
    "worst_group_accuracy",
    "from_validation/pair_accuracy",
    PAIR_ACCURACY,
    "from_validation/flip_rate",
    "from_training/flip_rate",
    "accuracy",
)
LAST = "last"
MEASURED = ("accuracy", "worst_group_accuracy", "flip_rate", "pair_accuracy")


def run(path: Path, seed: int) -> None:
    """Trains one seed of a recipe, and measures the checkpoint that each rule chooses."""
    dataset, name = seeds.dataset_of(path), f"{path.stem}-seed{seed}"
    output = seeds.ROOT / "outputs" / f"checkpoints-{dataset}-{name}"
    seeds.record_once(f"checkpoints_{dataset}", name, lambda: train_and_choose(path, seed, output))


def train_and_choose(path: Path, seed: int, output: Path) -> dict:
    """The record of a training, with what each rule chooses."""
    recipe, args, given = seeds.settings(path, seed, output, "--metric_for_best_model", PAIR_ACCURACY)
    args.save_total_limit = None  # every checkpoint is kept
    data = with_held_out(recipe.load_data(args.data_order_seed), args.data_order_seed)
    record = seeds.trained(recipe, args, given, data)
    record["data"]["held_out"] = {name: len(pairs) for name, pairs in data.validation_pairs.items()}
    looks = [entry for entry in read_json(output / "trainer_state.json")["log_history"] if "eval_loss" in entry]
    steps = {rule: chosen_step(looks, rule) for rule in RULES} | {LAST: record["steps"]}
    tested = {record["chosen_step"]: record["metrics"]["test"]}
    for step in {*steps.values()} - {*tested}:
        tested[step] = evaluate(str(output / f"checkpoint-{step}"), recipe, args, "test", None)
    record["choices"] = {
        rule: {"step": step, "test": {metric: tested[step][metric] for metric in MEASURED}}
        for rule, step in steps.items()
    }
    shutil.rmtree(output)
    return record


def with_held_out(data: Benchmark, seed: int) -> Benchmark:
    """The benchmark with a fifth of its training pairs held out, beside the pairs of its validation set."""
    kept, held_out = hold_out_pairs(data.pairs, "the training pairs", seed=seed)
    return replace(
        data, pairs=kept, validation_pairs={"from_validation": data.validation_pairs, "from_training": held_out}
    )


def chosen_step(looks: list[dict], rule: str) -> int:
    """The step of the best evaluation, of equals the earliest, as `Trainer` chooses.

    Args:
        looks: the evaluations in the log of a training, in order.
        rule: name of the metric.
    """
    sign = 1 if is_higher_better(rule) else -1
    return max(looks, key=lambda entry: sign * entry[f"eval_{rule}"])["step"]


if __name__ == "__main__":
    seeds.for_each(seeds.parser(__doc__).parse_args(), run)
