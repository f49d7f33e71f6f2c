# SPDX-License-Identifier: Apache-2.0
"""Draws the README's picture of pairs: `python recipes/scripts/draw_pairs.py` writes recipes/guides/pairs.png.

The left half shows training images, whose colour tells the label. The right half shows pairs: one digit in both
colours. The images are those of `load_digits`, scikit-learn's handwritten digits.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from ipg_hf.data import load_digits

TARGET = Path(__file__).resolve().parent.parent / "guides" / "pairs.png"
COLUMNS = 4


def draw(target: Path = TARGET) -> None:
    """Writes the picture.

    Args:
        target: the PNG file.
    """
    data = load_digits()
    labels = np.asarray(data.train["label"][:])
    shown = {
        "small (0 to 4)": [data.train[int(row)]["image"] for row in np.flatnonzero(labels == 0)[:COLUMNS]],
        "large (5 to 9)": [data.train[int(row)]["image"] for row in np.flatnonzero(labels == 1)[:COLUMNS]],
    }
    pair_labels = np.asarray(data.pairs["label"][:])
    rows = [int(row) for label in (0, 1) for row in np.flatnonzero(pair_labels == label)[: COLUMNS // 2]]
    sides = {f"side {side}": [data.pairs[row][f"image_{side}"] for row in rows] for side in "ab"}
    figure = plt.figure(figsize=(8, 2.3), dpi=150)
    halves = figure.subfigures(1, 2, wspace=0.04)
    for half, title, content in (
        (halves[0], "Training images: the colour tells the label", shown),
        (halves[1], "Pairs: one digit in both colours", sides),
    ):
        half.suptitle(title, fontsize=10)
        axes = half.subplots(
            2,
            COLUMNS,
            gridspec_kw={"wspace": 0.06, "hspace": 0.06, "left": 0.08, "right": 0.99, "top": 0.87, "bottom": 0.02},
        )
        for line, (name, images) in zip(axes, content.items(), strict=True):
            line[0].set_ylabel(name, fontsize=8)
            for axis, image in zip(line, images, strict=True):
                axis.imshow(image, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
    figure.savefig(target, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
