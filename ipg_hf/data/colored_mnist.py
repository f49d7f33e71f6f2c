# SPDX-License-Identifier: Apache-2.0
"""ColoredMNIST, from MNIST or Fashion-MNIST, by the protocol of IRM or of DomainBed; and IRM's perceptron.

Sources: Arjovsky et al., "Invariant Risk Minimization", arXiv 1907.02893, and its code; Gulrajani and Lopez-Paz, "In
Search of Lost Domain Generalization", arXiv 2007.01434, and its code (`domainbed/datasets.py`, `scripts/train.py`).
Do not compare numbers of one protocol with numbers of the other.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple, logging

from ..pairs.makers import check_choice, draw_rows, draw_swap
from .benchmark import Benchmark
from .digits import LABEL, classification_set, colored_pairs, encode_colored
from .locate import VARIABLE, find_folder, load_hub_set

logger = logging.get_logger(__name__)

Protocol = Literal["irm", "domainbed"]

LABEL_NOISE = 0.25
TRAIN_FLIPS = (0.2, 0.1)  # of the two environments
VALIDATION_FLIP = 0.5
TEST_FLIP = 0.9
DOMAINBED_FLIPS = (0.1, 0.2, 0.9)  # of the three environments; the last is the test
DOMAINBED_HOLDOUT = 0.2
NUM_PAIRS = 20_000

SHAPES = {"xtr": (28, 28), "ytr": (), "xte": (28, 28), "yte": ()}
FULL = {"xtr": 60_000, "xte": 10_000}


@dataclass(frozen=True)
class Images:
    """A set of 70,000 images of 28×28 pixels in ten classes.

    Args:
        title: name of the set.
        file: name of the file with its arrays.
        hub_set: id of the set on the Hub.
        label: ClassLabel with two names: of classes 0 to 4, and of classes 5 to 9.
    """

    title: str
    file: str
    hub_set: str
    label: datasets.ClassLabel


FIVES = datasets.ClassLabel(names=["first_five", "last_five"])
IMAGES = {
    "mnist": Images("MNIST", "mnist.npz", "ylecun/mnist", LABEL),
    "fashion_mnist": Images("Fashion-MNIST", "fashion_mnist.npz", "zalando-datasets/fashion_mnist", FIVES),
}


@dataclass(frozen=True)
class Split:
    """Which images a protocol uses in each split, and the probabilities that their colour is flipped.

    All arrays are 1-d. A row number counts the images of the training file first, then those of the test file.

    Args:
        train: row numbers of training.
        environment: environment of each training image.
        train_flips: flip probability of each training image.
        validation: row numbers of validation.
        validation_flips: flip probability of each validation image.
        test: row numbers of test.
        test_flips: flip probability of each test image.
    """

    train: np.ndarray
    environment: np.ndarray
    train_flips: np.ndarray
    validation: np.ndarray
    validation_flips: np.ndarray
    test: np.ndarray
    test_flips: np.ndarray


def load_colored_mnist(
    *,
    data_dir: str | None = None,
    seed: int = 0,
    num_pairs: int | None = None,
    oriented_pairs: bool = True,
    images: Literal["mnist", "fashion_mnist"] = "mnist",
    protocol: Protocol = "irm",
) -> Benchmark:
    """Makes ColoredMNIST from MNIST (LeCun, Cortes and Burges; CC BY-SA 3.0) or Fashion-MNIST (Zalando; MIT).

    - Image: RGB, 28×28 pixels. The digit is in the red or the green channel, the other channels are 0. IRM uses every
      second pixel only; [`ColoredMnistMLPForImageClassification`] does that. DomainBed uses all pixels.
    - Label: digit >= 5 (0 "small", 1 "large"; for Fashion-MNIST class >= 5, 0 "first_five", 1 "last_five"), flipped in
      25 % of the rows of every split. The expected accuracy of a classifier that ignores colour is therefore at most
      0.75. Attribute: 0 "red", 1 "green" = noisy label xor Bernoulli(flip). Group: 2·label + attribute.
    - Pairs: training images, side a red and side b green, with the noisy label. `source_id` is the number of the image
      in the training file. For an image of the test file it is 60,000 (the size of the training file) + its number in
      the test file. The pairs for the flip rate are all images of validation and test in both colours.

    Protocol `"irm"`:

    - Training: the first 50,000 images of the training file, shuffled and divided between two environments (column
      `environment`) with flip 0.2 (0) and 0.1 (1).
    - Test: the last 10,000 images of the training file, as in IRM's code, with flip 0.9.
    - Validation: every second image of the test file, 5,000, with flip 0.5. The four groups have about the same size,
      so the worst group can choose a checkpoint. This split is ours: the IRM code chooses on the test rows. Here no
      test row chooses.

    Protocol `"domainbed"`, its ColoredMNIST with the test environment "-90%":

    - All 70,000 images of both files are shuffled and divided among three environments with flip 0.1, 0.2 and 0.9.
    - Training: 80 % of the first two environments (column `environment`, 0 and 1), 37,335 images.
    - Validation: the other 20 % of these environments, 9,332 images, coloured as in training. It is DomainBed's
      training-domain validation set. DomainBed chooses by the mean accuracy, we choose by the worst group (ours). This
      is possible because colour follows the noisy label: the expected accuracy of a group does not depend on the flip,
      and the smallest of the four groups has about 700 images. No row of the test environment chooses, unlike in
      DomainBed's oracle selection.
    - Test: the whole third environment, 23,333 images (DomainBed reports on 80 % of it).
    - Further differences from DomainBed: its label is 1 for digits below 5 (a difference in names only), its images
      have two channels, and its random numbers are others.

    The images are in `data_dir`, or in the folder that the environment variable IPG_DATA names: a file `mnist.npz` or
    `fashion_mnist.npz` with the uint8 arrays xtr (60000, 28, 28), ytr (60000,), xte (10000, 28, 28) and yte (10000,).
    If there is no `data_dir` and no file, the Hub set `ylecun/mnist` or `zalando-datasets/fashion_mnist` is loaded. A
    file of other sizes is split in the same proportions, with a warning.

    Args:
        data_dir: folder of the file.
        seed: non-negative seed of the shuffling, the label noise, the colours and the draw of the pairs.
        num_pairs: number of training pairs, 1 to the number of training images. `None` is 20,000. Fewer pairs are a
            subset of more.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.
        images: the set that is coloured.
        protocol: how it is split and coloured.

    Raises:
        FileNotFoundError: the images are not found. The message says how to get them.
        ValueError: an option is unknown; the file is damaged or has other arrays; `num_pairs` is below 1 or above the
            number of training images.
    """
    check_choice("images", images, IMAGES)
    check_choice("protocol", protocol, get_args(Protocol))
    arrays, label = _load_arrays(data_dir, IMAGES[images]), IMAGES[images].label
    split = (_split_irm if protocol == "irm" else _split_domainbed)(len(arrays["xtr"]), len(arrays["xte"]), seed)
    gray, digits = (np.concatenate([arrays[f"{kind}tr"], arrays[f"{kind}te"]]) for kind in "xy")
    wanted = min(NUM_PAIRS, len(split.train)) if num_pairs is None else num_pairs
    pair_rows = draw_rows(len(split.train), wanted, seed=seed, of="training images")
    labels, colors = _draw_noise(digits[split.train], split.train_flips, np.random.default_rng((seed, 3)))
    encoded = encode_colored(gray[split.train], colors)
    swap = None if oriented_pairs else draw_swap(len(pair_rows), seed)
    pair_numbers = split.train[pair_rows]
    others = encode_colored(gray[pair_numbers], 1 - colors[pair_rows])
    # the side of a pair that has the training image's own colour is encoded already
    sides = [(encoded[row], other)[:: 1 - 2 * colors[row]] for row, other in zip(pair_rows, others, strict=True)]

    def rows_and_pairs(rows: np.ndarray, flips: np.ndarray, stream: int) -> tuple[datasets.Dataset, datasets.Dataset]:
        labels, colors = _draw_noise(digits[rows], flips, np.random.default_rng((seed, stream)))
        sides = [encode_colored(gray[rows], np.full(len(rows), color)) for color in range(2)]
        images = [sides[color][row] for row, color in enumerate(colors)]
        pairs = colored_pairs(*sides, labels, rows, label_feature=label)
        return classification_set(images, labels, colors, label), pairs

    validation, validation_pairs = rows_and_pairs(split.validation, split.validation_flips, 4)
    test, test_pairs = rows_and_pairs(split.test, split.test_flips, 5)
    return Benchmark(
        train=classification_set(encoded, labels, colors, label, environment=split.environment),
        validation=validation,
        test=test,
        pairs=colored_pairs(*zip(*sides, strict=True), labels[pair_rows], pair_numbers, swap, label),
        validation_pairs=validation_pairs,
        test_pairs=test_pairs,
    )


def _split_irm(in_train_file: int, in_test_file: int, seed: int) -> Split:
    num_train = in_train_file * 5 // 6
    environment = np.arange(num_train) % 2
    validation = in_train_file + np.arange(0, in_test_file, 2)
    test = np.arange(num_train, in_train_file)
    return Split(
        train=np.random.default_rng((seed, 2)).permutation(num_train),
        environment=environment,
        train_flips=np.take(TRAIN_FLIPS, environment),
        validation=validation,
        validation_flips=np.full(len(validation), VALIDATION_FLIP),
        test=test,
        test_flips=np.full(len(test), TEST_FLIP),
    )


def _split_domainbed(in_train_file: int, in_test_file: int, seed: int) -> Split:
    order = np.random.default_rng((seed, 2)).permutation(in_train_file + in_test_file)
    *training, test = (order[start :: len(DOMAINBED_FLIPS)] for start in range(len(DOMAINBED_FLIPS)))
    held_out = [int(len(rows) * DOMAINBED_HOLDOUT) for rows in training]
    kept = [len(rows) - count for rows, count in zip(training, held_out, strict=True)]
    return Split(
        train=np.concatenate([rows[count:] for rows, count in zip(training, held_out, strict=True)]),
        environment=np.repeat(np.arange(len(kept)), kept),
        train_flips=np.repeat(DOMAINBED_FLIPS[:-1], kept),
        validation=np.concatenate([rows[:count] for rows, count in zip(training, held_out, strict=True)]),
        validation_flips=np.repeat(DOMAINBED_FLIPS[:-1], held_out),
        test=test,
        test_flips=np.full(len(test), DOMAINBED_FLIPS[-1]),
    )


def _draw_noise(digits: np.ndarray, flips: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws noisy labels, and then colours that follow them (in IRM's order: noise first)."""
    labels = (digits >= 5) ^ (rng.random(len(digits)) < LABEL_NOISE)
    colors = labels ^ (rng.random(len(digits)) < flips)
    return labels.astype(np.int64), colors.astype(np.int64)


def _load_arrays(data_dir: str | None, images: Images) -> dict[str, np.ndarray]:
    """Loads the arrays of `SHAPES` from the file or from the Hub."""
    ways = (
        f"Put {images.file} (uint8 arrays xtr (60000, 28, 28), ytr (60000,), xte (10000, 28, 28), yte (10000,)) into a "
        f"folder and name the folder as data_dir or in the environment variable {VARIABLE}. Or connect to the internet "
        f"and give no data_dir: the Hub set {images.hub_set} is loaded. A benchmark that needs no download: "
        "recipes/digits/ipg_resnet.yaml."
    )
    folder = find_folder(data_dir, ["."], [images.file], ways)
    return _read_file(folder / images.file, images) if folder else _load_hub_arrays(images, ways)


def _read_file(path: Path, images: Images) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        arrays = {name: file[name] for name in SHAPES if name in file} if isinstance(file, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as failure:
        raise ValueError(f"{path} cannot be read, it is damaged or cut off ({failure}). Get it again.") from failure
    _check_arrays(arrays, str(path), images)
    return arrays


def _load_hub_arrays(images: Images, ways: str) -> dict[str, np.ndarray]:
    hub = load_hub_set(images.hub_set, ("image", "label"), ("train", "test"), ways)
    arrays = {}
    for split, suffix in (("train", "tr"), ("test", "te")):
        arrays[f"x{suffix}"] = np.stack([np.asarray(image) for image in hub[split]["image"]])
        arrays[f"y{suffix}"] = np.asarray(hub[split]["label"][:], dtype=np.uint8)
    _check_arrays(arrays, images.hub_set, images)
    return arrays


def _check_arrays(arrays: dict[str, np.ndarray], where: str, images: Images) -> None:
    missing = [name for name in SHAPES if name not in arrays]
    if missing:
        raise ValueError(f"{where} lacks the arrays {missing}: it must have {list(SHAPES)}.")
    for name, shape in SHAPES.items():
        array = arrays[name]
        rows = len(arrays["x" + name[1:]])
        if array.dtype != np.uint8 or array.shape != (rows, *shape):
            wanted = ("N" if name[0] == "x" else rows, *shape)
            raise ValueError(f"{name} of {where} is {array.dtype} {array.shape}, but must be uint8 {wanted}.")
        if name[0] == "y" and array.max(initial=0) > 9:
            raise ValueError(f"{name} of {where} has the label {array.max()}, but classes are 0 to 9.")
        if rows < 12:
            raise ValueError(f"{name} of {where} has {rows} rows, too few to split: it needs 12 or more.")
    sizes = {name: len(arrays[name]) for name in FULL}
    if sizes != FULL:
        logger.warning(
            f"{where} has {sizes['xtr']} and {sizes['xte']} images instead of {images.title}'s 60000 and 10000. They "
            "are split in the same proportions, but results cannot be compared with those of others. Use all of "
            f"{images.title}."
        )


class ColoredMnistMLPConfig(PreTrainedConfig):
    """Config of [`ColoredMnistMLPForImageClassification`]; the defaults are IRM's network.

    Args:
        hidden_size: width of the hidden layers.
        num_hidden_layers: number of hidden layers, at least 1.
        image_size: height and width of the images in pixels.
        num_channels: number of channels of the images, at least 2. Red and green are used.
        subsample: distance of the pixels that are used, along rows and columns, at least 1. 2 uses every second pixel.
    """

    model_type = "colored_mnist_mlp"

    hidden_size: int = 390
    num_hidden_layers: int = 2
    image_size: int = 28
    num_channels: int = 3
    subsample: int = 2

    def __post_init__(self, **kwargs: Any):
        smallest = {"hidden_size": 1, "num_hidden_layers": 1, "image_size": 1, "num_channels": 2, "subsample": 1}
        for name, least in smallest.items():
            if not (isinstance(value := getattr(self, name), int) and value >= least):
                raise ValueError(f"{name}={value!r} must be an int of at least {least}.")
        super().__post_init__(**kwargs)


class ColoredMnistMLPForImageClassification(PreTrainedModel):
    """The multi-layer perceptron of IRM's ColoredMNIST, with ReLU: 2·14·14 = 392, 390, 390, number of classes.

    As in IRM, weights are initialised by Xavier's uniform distribution and biases with zero. IRM's network has one
    output and a binary loss. This one has an output per class and the cross-entropy loss.

    Args:
        config: sizes of the layers.
    """

    config_class = ColoredMnistMLPConfig
    config: ColoredMnistMLPConfig
    base_model_prefix = "hidden"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: ColoredMnistMLPConfig):
        super().__init__(config)
        width = 2 * (-(-config.image_size // config.subsample)) ** 2
        layers: list[nn.Module] = []
        for _ in range(config.num_hidden_layers):
            layers += [nn.Linear(width, config.hidden_size), nn.ReLU()]
            width = config.hidden_size
        self.hidden = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: shape (B, num_channels, image_size, image_size). IRM's values are in 0..1.
            labels: class ids, int64, shape (B,).
            **kwargs: arguments of the loss, for example `num_items_in_batch`.

        Returns:
            `logits`, shape (B, num_labels), and with labels the `loss`.

        Raises:
            ValueError: the images have another size.
        """
        wanted = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}, but this model takes (batch, {wanted[0]}, {wanted[1]}, "
                f"{wanted[2]}). Change the size of the image processor, or image_size and num_channels of the config."
            )
        step = self.config.subsample
        logits = self.classifier(self.hidden(pixel_values[:, :2, ::step, ::step].flatten(1)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(ColoredMnistMLPConfig.model_type, ColoredMnistMLPConfig)
AutoModelForImageClassification.register(ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification)
