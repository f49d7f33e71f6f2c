# SPDX-License-Identifier: Apache-2.0
"""Pairs by a small editor that is learned from unpaired images of the two values of an attribute.

Launch: python recipes/scripts/generated.py RECIPE FOLDER [--size 64] [--steps 800] [--num_pairs 2000] [--seed 0]

The data are the training images of RECIPE. The editor is a translation network in the manner of StarGAN (Choi et al.,
arXiv 1711.09020): it sees an image and the wanted value, and adds a difference to the image. FOLDER gets its weights
(`editor.pt`), the edits, and two sets of pairs: `all.parquet` (`generate_pairs` without its filter of labels) and
`kept.parquet`. That has the edits of which at least half of the 10 nearest images of validation have their label, in
the features of the recipe's network before its training (random where it has no pretrained weights). A recipe reads the
pairs by `pairs: {maker: table, path: FOLDER/all.parquet}`. `pairs.html` shows some, `settings.json` has the settings.
What FOLDER has is not made again; one editor serves all seeds of a suite. Half of the editor's batches are mirrored.
"""

import argparse
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils import tqdm
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from ipg_hf.pairs import generate_pairs, label_neighbors, preview_pairs
from ipg_hf.recipe import parse_recipe
from ipg_hf.record import read_json, write_json
from ipg_hf.run import keep_memory

WIDTH, BATCH, RATE = 32, 16, 2e-4
CYCLE, IDENTITY = 3.0, 1.0  # weights of the losses beside those of the critic


class Editor(nn.Module):
    """Adds a difference to images, float, shape (n, 3, size, size) in [-1, 1], for values of -1 or 1, shape (n,)."""

    def __init__(self):
        super().__init__()
        wide, widest = 2 * WIDTH, 4 * WIDTH
        self.first = _block(nn.Conv2d(4, WIDTH, 5, padding=2), WIDTH)
        self.down = nn.Sequential(
            _block(nn.Conv2d(WIDTH, wide, 4, 2, 1), wide), _block(nn.Conv2d(wide, widest, 4, 2, 1), widest)
        )
        self.middle = nn.ModuleList(_block(nn.Conv2d(widest, widest, 3, padding=1), widest) for _ in range(4))
        self.up = nn.Sequential(
            _block(nn.ConvTranspose2d(widest, wide, 4, 2, 1), wide),
            _block(nn.ConvTranspose2d(wide, WIDTH, 4, 2, 1), WIDTH),
        )
        self.last = nn.Conv2d(2 * WIDTH, 3, 5, padding=2)

    def forward(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        wanted = values[:, None, None, None].expand(-1, 1, *images.shape[2:])
        first = self.first(torch.cat([images, wanted], 1))
        hidden = self.down(first)
        for block in self.middle:
            hidden = hidden + block(hidden)
        return images + self.last(torch.cat([first, self.up(hidden)], 1))


class Critic(nn.Module):
    """Tells images from edits, by patch, and the value of the attribute."""

    def __init__(self):
        super().__init__()
        widths = [3, WIDTH, 2 * WIDTH, 4 * WIDTH]
        layers = [[nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2)] for a, b in itertools.pairwise(widths)]
        self.features = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.real, self.value = nn.Conv2d(widths[-1], 1, 3, padding=1), nn.Linear(widths[-1], 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(images)
        return self.real(features), self.value(features.mean((2, 3)))[:, 0]


def _block(layer: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.InstanceNorm2d(width, affine=True), nn.ReLU())


def train_editor(images: torch.Tensor, values: torch.Tensor, steps: int) -> Editor:
    """Trains an editor.

    Args:
        images: in [-1, 1], shape (n, 3, size, size).
        values: -1 or 1, float, shape (n,).
        steps: number of steps of critic and editor.
    """
    editor, critic = Editor(), Critic()
    adam = {"lr": RATE, "betas": (0.5, 0.999)}
    editor_optimizer, critic_optimizer = (torch.optim.Adam(n.parameters(), **adam) for n in (editor, critic))
    places = [torch.nonzero(values == value)[:, 0] for value in (-1, 1)]
    for step in tqdm(range(steps), desc="Editor"):
        for optimizer in (editor_optimizer, critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, 2 * (1 - step / steps))
        rows = torch.cat([place[torch.randint(len(place), (BATCH // 2,))] for place in places])
        real, own = images[rows], values[rows]
        if torch.rand(()) < 0.5:
            real = real.flip(3)
        edit = editor(real, -own)
        realness, value = critic(real)
        realness_of_edit, _ = critic(edit.detach())
        loss = F.relu(1 - realness).mean() + F.relu(1 + realness_of_edit).mean() + _value_loss(value, own)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        realness, value = critic(edit)
        loss = -realness.mean() + _value_loss(value, -own) + CYCLE * F.l1_loss(editor(edit, own), real)
        loss = loss + IDENTITY * F.l1_loss(editor(real, own), real)
        editor_optimizer.zero_grad()
        loss.backward()
        editor_optimizer.step()
    return editor.eval()


def _value_loss(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, (values + 1) / 2)


def tensors(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Square images in [-1, 1], float, shape (n, 3, size, size)."""
    small = [image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2) / 127.5 - 1


def edit_with(editor: Editor, names: Sequence[Any], size: int):
    """The editor as `generate_pairs` calls it: the difference is made at `size` pixels, and added at full size."""

    @torch.no_grad()
    def edit(images: list[Image.Image], values: list[Any], seeds: list[int]) -> list[Image.Image]:
        small = tensors(images, size)
        wanted = torch.tensor([2.0 * (value == names[1]) - 1 for value in values])
        made = []
        for image, difference in zip(images, editor(small, wanted) - small, strict=True):
            whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
            more = F.interpolate(127.5 * difference[None], whole.shape[2:], mode="bilinear", align_corners=False)
            made.append(Image.fromarray((whole + more)[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()))
        return made

    return edit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--num_pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.size < 8 or options.size % 4:
        parser.error(f"--size {options.size} must be a multiple of 4, 8 or more")
    options.recipe = Path(options.recipe).as_posix()
    keep_memory()
    recipe, _, _ = parse_recipe(options.recipe)
    data = recipe.load_data(options.seed, with_pairs=False)
    train = data.train
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    made = options.folder / "settings.json"
    if made.exists() and read_json(made) != settings:
        raise SystemExit(f"{options.folder} was made with {read_json(made)}: name another folder, or remove it.")
    write_json(made, settings)
    set_seed(options.seed)
    weights, start = options.folder / "editor.pt", time.monotonic()
    if weights.exists():
        editor = Editor().eval()
        editor.load_state_dict(torch.load(weights, weights_only=True))
    else:
        images = tensors(train["image"][:], options.size)
        editor = train_editor(images, 2.0 * torch.tensor(train["attribute"][:]) - 1, options.steps)
        torch.save(editor.state_dict(), weights.with_suffix(".part"))
        os.replace(weights.with_suffix(".part"), weights)
        print(f"the editor: {time.monotonic() - start:.0f} s")
    edit = edit_with(editor, train.features["attribute"].names, options.size)
    how = {"attribute": "attribute", "num_pairs": min(options.num_pairs, len(train)), "batch_size": 64}
    for name in ("all", "kept"):
        path, classify = options.folder / f"{name}.parquet", None
        if path.exists():
            continue
        if name == "kept":
            set_seed(options.seed)  # the network may have no trained weights
            classify = label_neighbors(recipe.build_model(train), recipe.build_processor(), data.validation)
        pairs = generate_pairs(train, edit, options.folder / "edits", classify=classify, seed=options.seed, **how)
        if name == "all":
            preview_pairs(pairs, options.folder / "pairs.html", overwrite=True)
        pairs.to_parquet(path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        print(f"{path}: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
