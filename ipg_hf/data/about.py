# SPDX-License-Identifier: Apache-2.0
"""Facts of each benchmark, for run records and model cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class About:
    """Facts of a benchmark.

    Args:
        title: name of the benchmark.
        attribute: the spurious attribute or attributes. `None` if it depends on the data.
        shortcut: how the attribute and the label are related, in training and in the test set.
        pairs: what the two sides of a pair are. `None` if the benchmark has no pairs of its own.
        num_pairs: number of pairs by default. `None` if it depends on the data.
        license: license of the images. `None` if it depends on the data.
        source: where the images come from.
        hub_set: id of the images on the Hub. `None` if they are not on the Hub.
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
    "waterbirds": About(
        title="Waterbirds",
        attribute="the place behind a bird",
        shortcut="The place goes with the kind of bird in 95 % of the training images; validation and test have each "
        "kind half on land, half on water.",
        pairs="the bird of one training image, by its mask, on land (side a) and on water (side b)",
        num_pairs=300,
        license="non-commercial research and education only",
        source="Waterbirds (Sagawa et al., arXiv 1911.08731), of CUB-200-2011 and Places",
        hub_set="grodino/waterbirds",
    ),
    "celeba": About(
        title="CelebA, blond hair",
        attribute="whether a person is labelled male",
        shortcut="Blond men are few, 1,387 of 162,770 training images; the test set has about the same shares.",
        pairs=None,
        num_pairs=None,
        license="non-commercial research only",
        source="CelebA (Liu et al., ICCV 2015), labels as in arXiv 1911.08731",
        hub_set="flwrlabs/celeba",
    ),
    "scenes": About(
        title="Scenes, birds cut from photographs on land or on water",
        attribute="the place behind a bird",
        shortcut="The place goes with the kind of bird in 95 % of the training images; validation and test are "
        "balanced by group.",
        pairs="the bird of one training image on land (side a) and on water (side b)",
        num_pairs=960,
        license="not for redistribution",
        source="CUB-200-2011 (research and education only) and Intel image classification, composed by masks",
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

ALL_ALIGNED = "The place goes with the kind of bird in every training image; validation and test are balanced by place."
FASHION = "Fashion-MNIST (Zalando Research)"
# (benchmark, options of its loader, facts that change with these options). All entries that match apply, in this order.
VARIANTS: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
    (
        "colored_mnist",
        {"protocol": "domainbed"},
        {
            "title": "ColoredMNIST, protocol of DomainBed",
            "source": "MNIST (LeCun, Cortes, Burges), coloured as in DomainBed (arXiv 2007.01434)",
        },
    ),
    (
        "colored_mnist",
        {"images": "fashion_mnist"},
        {
            "title": "Coloured Fashion-MNIST, protocol of IRM",
            "attribute": "the colour of a garment",
            "pairs": "one training image in red (side a) and in green (side b)",
            "license": "MIT",
            "source": f"{FASHION}, coloured as MNIST is in arXiv 1907.02893",
            "hub_set": "zalando-datasets/fashion_mnist",
        },
    ),
    (
        "colored_mnist",
        {"images": "fashion_mnist", "protocol": "domainbed"},
        {
            "title": "Coloured Fashion-MNIST, protocol of DomainBed",
            "source": f"{FASHION}, coloured as MNIST is in DomainBed (arXiv 2007.01434)",
        },
    ),
    ("waterbirds", {"correlation": "100"}, {"title": "Waterbirds without minority groups", "shortcut": ALL_ALIGNED}),
    ("scenes", {"correlation": "100"}, {"shortcut": ALL_ALIGNED}),
)


def describe(dataset: str, options: Mapping[str, Any] | None = None) -> About:
    """Returns the facts of a benchmark that is loaded with the given options.

    Args:
        dataset: name of the benchmark in `ABOUT`, or the id of a set on the Hub.
        options: options of its loader.
    """
    if dataset not in ABOUT:
        shortcut = ABOUT["files"].shortcut
        return About(dataset, None, shortcut, None, None, None, source=f"the Hub set {dataset}", hub_set=dataset)
    about = ABOUT[dataset]
    for name, given, changes in VARIANTS:
        if name == dataset and all(str((options or {}).get(key)) == value for key, value in given.items()):
            about = replace(about, **changes)
    return about
