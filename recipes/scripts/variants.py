# SPDX-License-Identifier: Apache-2.0
"""Variants of a guided training that no setting makes: cheaper pairs, and LoRA.

Launch: python recipes/scripts/variants.py recipes/scenes/ipg_dinov2.yaml --variants small tokens [--seeds 0 1 2 3 4]

A record is the run `<recipe>-<variant>-seed<n>` in `recipes/records/variants_<dataset>.jsonl`. What has a record is not
run again. `page_tables.py` takes its numbers from them.
"""

from dataclasses import fields
from functools import partial
from pathlib import Path

import peft
import seeds
import torch
from torch.nn.functional import interpolate

from ipg_hf import IPGTrainer
from ipg_hf.baselines import METHODS
from ipg_hf.recipe import Recipe
from ipg_hf.run import train
from ipg_hf.step import GuidedStep

KEPT = 0.25  # share of the patch tokens
SMALLER = 0.5  # of height and width
LARGER = 4.0  # times the learning rate
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}


class SmallPairs(GuidedStep):
    """The pairs have half the height and width, a quarter of the patches."""

    def forward(self, module, batch):
        pixels = interpolate(batch["pixel_values"], scale_factor=SMALLER, mode="bilinear", antialias=True)
        return super().forward(module, {**batch, "pixel_values": pixels})


class FewTokens(GuidedStep):
    """The pairs keep a quarter of the patch tokens of a DINOv2, drawn at each step, the same on both sides."""

    def forward(self, module, batch):
        def drop(embeddings, _, tokens):
            pairs, patches = len(tokens) // 2, tokens.shape[1] - 1
            order = torch.rand(pairs, patches).argsort(1)[:, : round(KEPT * patches)] + 1
            kept = torch.cat([torch.zeros(pairs, 1, dtype=order.dtype), order], 1).repeat(2, 1).to(tokens.device)
            return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))

        hook = module.dinov2.embeddings.register_forward_hook(drop)
        try:
            return super().forward(module, batch)
        finally:
            hook.remove()


class LargeSteps(GuidedStep):
    """The corrective update has four times the learning rate, to go with a correction at every fourth step."""

    def optimizer_step(self):
        groups = self.trainer.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = LARGER * rate
        super().optimizer_step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


class AdaptedRecipe(Recipe):
    """A recipe whose model learns adapters and its head alone."""

    def build_model(self, train):
        return peft.get_peft_model(super().build_model(train), peft.LoraConfig(**LORA))


# variant -> the step, the recipe's class, and flags
VARIANTS = {
    "small": (SmallPairs, Recipe, ()),
    "tokens": (FewTokens, Recipe, ()),
    "every_4th": (GuidedStep, Recipe, ("--correction_interval", "4")),
    "every_4th_large": (LargeSteps, Recipe, ("--correction_interval", "4")),
    "lora": (GuidedStep, AdaptedRecipe, ("--learning_rate", "1.5e-3")),  # usually ten times that of a whole network
}


def made(path: Path, variant: str, seed: int, output: Path) -> dict:
    """Trains one seed of a variant; its record."""
    step, kind, flags = VARIANTS[variant]
    recipe, args, given = seeds.settings(path, seed, output, *flags)
    recipe = kind(**{entry.name: getattr(recipe, entry.name) for entry in fields(Recipe)})
    method = METHODS[recipe.method]
    METHODS[recipe.method] = method._replace(trainer=type("VariantTrainer", (IPGTrainer,), {"step_class": step}))
    try:
        return {"variant": variant, **train(recipe, args, given)}
    finally:
        METHODS[recipe.method] = method


def run(path: Path, seed: int, variants: list[str]) -> None:
    """Trains one seed of each variant of a recipe."""
    dataset = seeds.dataset_of(path)
    for variant in variants:
        name = f"{path.stem}-{variant}-seed{seed}"
        output = seeds.ROOT / "outputs" / f"variants-{dataset}-{name}"
        seeds.record_once(f"variants_{dataset}", name, partial(made, path, variant, seed, output))


if __name__ == "__main__":
    parser = seeds.parser(__doc__)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], required=True)
    options = parser.parse_args()
    seeds.for_each(options, partial(run, variants=options.variants))
