# SPDX-License-Identifier: Apache-2.0
"""What model cards say of each benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """Facts of a benchmark.

    Args:
        title: its name, for people.
        attribute: the spurious attribute, or several; `None` where it depends on the data.
        shortcut: how the attribute goes with the label in training, and how in the test set.
        pairs: what the two sides of a pair of the benchmark's own are; `None` where it has none.
        num_pairs: their number by default; `None` where it depends on the data.
        license: of the images; `None` where it depends on the data.
        source: where the images come from.
        hub_set: id of the images on the Hub, or `None`.
    """

    title: str
    attribute: str | None
    shortcut: str
    pairs: str | None
    num_pairs: int | None
    license: str | None
    source: str
    hub_set: str | None = None


UCI = "1,797 handwritten digits of 8×8 pixels that come with scikit-learn (Alpaydin and Kaynak, UCI, 1998)"

ABOUT = {
    "digits": About(
        title="Coloured digits",
        attribute="the colour of a digit",
        shortcut="The colour tells the label of every training image; in the test set it misleads nine times in ten.",
        pairs="one training digit in red (side a) and in green (side b)",
        num_pairs=300,
        license="CC BY 4.0",
        source=UCI,
    ),
    "marked_digits": About(
        title="Coloured and marked digits",
        attribute="the colour of a digit and a mark in its corner",
        shortcut="Each of the two tells the label of every training image; the test set is balanced.",
        pairs="one training digit in red and in green, and one without and with the mark",
        num_pairs=300,
        license="CC BY 4.0",
        source=UCI,
    ),
    "stroke_mass": About(
        title="Stroke mass of coloured digits",
        attribute="the colour of a digit",
        shortcut="The colour tells whether a training target is above the median; in the test set it misleads nine "
        "times in ten.",
        pairs="one training digit in red (side a) and in green (side b)",
        num_pairs=300,
        license="CC BY 4.0",
        source=UCI,
    ),
    "colored_mnist": About(
        title="ColoredMNIST, protocol of IRM",
        attribute="the colour of a digit",
        shortcut="A quarter of the labels is wrong. The colour disagrees with the given label in 10 to 20 % of the "
        "training images and in 90 % of the test images.",
        pairs="one training digit in red (side a) and in green (side b)",
        num_pairs=20_000,
        license="CC BY-SA 3.0",
        source="MNIST (LeCun, Cortes, Burges), coloured as in arXiv 1907.02893",
        hub_set="ylecun/mnist",
    ),
    "files": About(
        title="A folder of image files",
        attribute=None,
        shortcut="How the attribute goes with the label is not recorded.",
        pairs="the pairs that the folder holds",
        num_pairs=None,
        license=None,
        source="a folder of the user's own",
    ),
}
