# SPDX-License-Identifier: Apache-2.0
"""Draws the picture of a scan and a repair: `python recipes/scripts/draw_scan.py` writes recipes/guides/scan.png.

A ResNet learns the colour of scikit-learn's handwritten digits. A scan finds the colour, pairs are made against the
first finding from the training images alone, the training goes on with them, and the model is scanned again.
"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from ipg_hf import IPGConfig, IPGTrainer
from ipg_hf.data import load_digits
from ipg_hf.pairs import exchange_pairs
from ipg_hf.scan import Scan, scan

TARGET = Path(__file__).resolve().parent.parent / "guides" / "scan.png"
EXAMPLES = 4
STEPS = {False: 50, True: 300}  # without and with pairs
SHOWN = 5  # parts beside the center
NAMES = {0: "small", 1: "large"}  # digits


def scans(seed: int = 0) -> tuple[Scan, Scan]:
    """A scan of the plain model, and one after the training with pairs against its first finding."""
    data, processor = load_digits(), ViTImageProcessor(size={"height": 16, "width": 16})
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", id2label=NAMES)
    model = ResNetForImageClassification(config)
    found: list[Scan] = []
    with tempfile.TemporaryDirectory() as folder:
        for guided in STEPS:
            pairs = exchange_pairs(data.train, part=found[0].findings[0].part, skip_unchanged=True) if guided else None
            settings = {"learning_rate": 3e-3, "freeze_norm": guided, "seed": seed, "use_cpu": True}
            args = IPGConfig(folder, max_steps=STEPS[guided], save_strategy="no", report_to="none", **settings)
            trainer = IPGTrainer(model, args, train_dataset=data.train, pair_dataset=pairs, processing_class=processor)
            trainer.train()
            found.append(scan(model, data.validation, processor))
    return found[0], found[1]


def draw(target: Path = TARGET) -> None:
    """Writes the picture.

    Args:
        target: the PNG file.
    """
    before, after = scans()
    first = before.findings[0].part
    figure = plt.figure(figsize=(8, 2.6), dpi=150)
    left, right = figure.subfigures(1, 2, width_ratios=[1.05, 1])
    left.suptitle(f"First finding: {first}", fontsize=10)
    places = {"wspace": 0.06, "left": 0.16, "right": 0.98, "top": 0.8, "bottom": 0.03, "hspace": 0.22}
    axes = left.subplots(2, EXAMPLES, gridspec_kw=places)
    for column, example in zip(axes.T, before.examples[first][:EXAMPLES], strict=True):
        for axis, image, answer in zip(
            column, (example.image, example.edited), (example.answer, example.answer_after), strict=True
        ):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(answer, fontsize=8, pad=3)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("image", f"other {first}"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    right.suptitle("Effect of each part on the answer", fontsize=10)
    axis = right.subplots(gridspec_kw={"left": 0.24, "right": 0.97, "top": 0.88, "bottom": 0.14})
    parts = [finding.part for finding in (*before.findings[:SHOWN], before.findings[-1])]
    for number, (title, result) in enumerate({"plain model": before, "after pairs against it": after}.items()):
        effects = {finding.part: finding for finding in result.findings}
        shown = [effects[part] for part in parts]
        lengths = [[max(f.effect - f.low, 0) for f in shown], [max(f.high - f.effect, 0) for f in shown]]
        heights = [place + 0.19 * (2 * number - 1) for place in range(len(parts))]
        axis.barh(heights, [f.effect for f in shown], 0.36, xerr=lengths, label=title, error_kw={"linewidth": 0.8})
    axis.set_yticks(range(len(parts)), [part.replace("_", " ") for part in parts], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.6)
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(fontsize=8, loc="center right", frameon=False)
    figure.savefig(target, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
