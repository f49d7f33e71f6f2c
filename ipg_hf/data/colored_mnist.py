# SPDX-License-Identifier: Apache-2.0
"""ColoredMNIST by the protocol of IRM, and the multi-layer perceptron that goes with it.

Source: Arjovsky et al., "Invariant Risk Minimization", arXiv 1907.02893, and its code. Numbers of other protocols
(DomainBed's, say) do not compare with those of this one.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple, logging

from ..pairs.makers import draw_rows, draw_swap
from .digits import Benchmark, classification_set, colored_pairs, encode_colored

logger = logging.get_logger(__name__)

LABEL_NOISE = 0.25
TRAIN_FLIPS = (0.2, 0.1)  # the two environments
VALIDATION_FLIP = 0.5
TEST_FLIP = 0.9
NUM_PAIRS = 20_000

FILE = "mnist.npz"
HUB_SET = "ylecun/mnist"
VARIABLE = "IPG_DATA"
SHAPES = {"xtr": (28, 28), "ytr": (), "xte": (28, 28), "yte": ()}
FULL = {"xtr": 60_000, "xte": 10_000}


def load_colored_mnist(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """Makes ColoredMNIST (IRM protocol) of MNIST (LeCun, Cortes and Burges).

    - Image: RGB, 28×28 pixels; the digit in the red or the green channel, the others 0. IRM keeps every second pixel:
      [`ColoredMnistMLPForImageClassification`] does that.
    - Label: digit >= 5 (0 "small", 1 "large"), flipped in 25 % of the rows of every split: no classifier that ignores
      colour can expect more than 0.75. Attribute: 0 "red", 1 "green" = noisy label xor Bernoulli(flip).
    - Training: the first 50,000 images of MNIST's training file, shuffled and dealt out to two environments (column
      `environment`) with flip 0.2 (0) and 0.1 (1), merged.
    - Test: the last 10,000 images of the training file, as in IRM's code, with flip 0.9.
    - Validation: every second image of MNIST's own test file, 5,000, with flip 0.5, so that the four groups are of like
      size and the worst of them can choose a checkpoint. This split is ours: the IRM code chooses on the test rows.
      Here no test row is used for choosing.
    - Pairs: training images, side a red and side b green, with the noisy label. `source_id` is the number of the image
      in the training file, or for the test file 60,000 (the size of the former) + its number in that.

    The images are looked for in `data_dir`, or else in the folder that the environment variable IPG_DATA names (a file
    `mnist.npz` with the uint8 arrays xtr (60000, 28, 28), ytr (60000,), xte (10000, 28, 28), yte (10000,)); where there
    is no `data_dir` and no such file, the Hub set `ylecun/mnist` is loaded. A file of other sizes is split in the same
    proportions, with a warning.

    Args:
        data_dir: folder of `mnist.npz`.
        seed: non-negative; seed of the shuffling, label noise, colours, and of the pairs that are drawn.
        num_pairs: number of training pairs, 1 to 50,000; `None` is 20,000. Fewer pairs are a subset of more.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.

    Raises:
        FileNotFoundError: no images are found; the message says how to get them.
        ValueError: the file is damaged or holds other arrays; more pairs than training images, or fewer than 1.
    """
    mnist = _find_mnist(data_dir)
    gray, digits = mnist["xtr"], mnist["ytr"]
    num_train = len(gray) * 5 // 6
    available = min(NUM_PAIRS, num_train) if num_pairs is None else num_pairs
    pair_rows = draw_rows(num_train, available, seed=seed, of="training images")
    order = np.random.default_rng((seed, 2)).permutation(num_train)
    environment = np.arange(num_train) % 2
    labels, colors = _noisy(digits[order], np.take(TRAIN_FLIPS, environment), np.random.default_rng((seed, 3)))
    images = encode_colored(gray[order], colors)
    swap = None if oriented_pairs else draw_swap(len(pair_rows), seed)
    others = encode_colored(gray[order[pair_rows]], 1 - colors[pair_rows])
    # of the two sides of a pair, the one in the training image's own colour is encoded already
    sides = [(images[row], other)[:: 1 - 2 * colors[row]] for row, other in zip(pair_rows, others, strict=True)]
    validation, validation_pairs = _evaluation_split(
        mnist["xte"][::2], mnist["yte"][::2], VALIDATION_FLIP, len(gray) + np.arange(0, len(mnist["xte"]), 2), (seed, 4)
    )
    test, test_pairs = _evaluation_split(
        gray[num_train:], digits[num_train:], TEST_FLIP, np.arange(num_train, len(gray)), (seed, 5)
    )
    return Benchmark(
        train=classification_set(images, labels, colors, environment=environment),
        validation=validation,
        test=test,
        pairs=colored_pairs(*zip(*sides, strict=True), labels[pair_rows], order[pair_rows], swap),
        validation_pairs=validation_pairs,
        test_pairs=test_pairs,
    )


def _noisy(digits: np.ndarray, flip: np.ndarray | float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noisy labels, and the colours drawn from them (IRM's order: noise first)."""
    labels = (digits >= 5) ^ (rng.random(len(digits)) < LABEL_NOISE)
    colors = labels ^ (rng.random(len(digits)) < flip)
    return labels.astype(np.int64), colors.astype(np.int64)


def _evaluation_split(
    gray: np.ndarray, digits: np.ndarray, flip: float, source_id: np.ndarray, seed: tuple[int, int]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    labels, colors = _noisy(digits, flip, np.random.default_rng(seed))
    sides = [encode_colored(gray, np.full(len(gray), color)) for color in range(2)]
    images = [sides[color][row] for row, color in enumerate(colors)]
    return classification_set(images, labels, colors), colored_pairs(*sides, labels, source_id)


def _find_mnist(data_dir: str | None) -> dict[str, np.ndarray]:
    """The arrays of `SHAPES`, from the first source that has them."""
    ways = (
        f"Either put {FILE} (uint8 arrays xtr (60000, 28, 28), ytr (60000,), xte (10000, 28, 28), yte (10000,)) into a "
        f"folder and name it as data_dir or in the environment variable {VARIABLE}, or let the Hub set {HUB_SET} be "
        "loaded: connect to the internet and give no data_dir. A benchmark that needs no data: "
        "recipes/digits/ipg_vit_tiny.yaml."
    )
    folder = data_dir if data_dir is not None else os.environ.get(VARIABLE)
    if folder and (path := Path(folder) / FILE).is_file():
        return _read_file(path)
    if data_dir is not None:
        raise FileNotFoundError(f"data_dir={data_dir!r} has no file {FILE}. {ways}")
    try:
        return _from_hub()
    except Exception as failure:
        searched = f"{VARIABLE}={folder!r} has no file {FILE}" if folder else f"{VARIABLE} is not set"
        raise FileNotFoundError(f"MNIST is not found: {searched}, and {HUB_SET}: {failure}. {ways}") from failure


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        arrays = {name: file[name] for name in SHAPES if name in file} if isinstance(file, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as failure:
        raise ValueError(f"{path} cannot be read, it is damaged or cut off ({failure}). Get it anew.") from failure
    _check_arrays(arrays, str(path))
    return arrays


def _from_hub() -> dict[str, np.ndarray]:
    hub = datasets.load_dataset(HUB_SET)
    arrays = {}
    for split, suffix in (("train", "tr"), ("test", "te")):
        arrays[f"x{suffix}"] = np.stack([np.asarray(image) for image in hub[split]["image"]])
        arrays[f"y{suffix}"] = np.asarray(hub[split]["label"][:], dtype=np.uint8)
    _check_arrays(arrays, HUB_SET)
    return arrays


def _check_arrays(arrays: dict[str, np.ndarray], where: str) -> None:
    missing = [name for name in SHAPES if name not in arrays]
    if missing:
        raise ValueError(f"{where} lacks the arrays {missing}; it must hold {list(SHAPES)}.")
    for name, shape in SHAPES.items():
        array = arrays[name]
        rows = len(arrays["x" + name[1:]])
        if array.dtype != np.uint8 or array.shape != (rows, *shape):
            wanted = ("N" if name[0] == "x" else rows, *shape)
            raise ValueError(f"{name} of {where} is {array.dtype} {array.shape}, but must be uint8 {wanted}.")
        if name[0] == "y" and array.max(initial=0) > 9:
            raise ValueError(f"{name} of {where} has the label {array.max()}, but digits are 0 to 9.")
        if rows < 12:
            raise ValueError(f"{name} of {where} has {rows} rows, too few to split.")
    sizes = {name: len(arrays[name]) for name in FULL}
    if sizes != FULL:
        logger.warning(
            f"{where} has {sizes['xtr']} and {sizes['xte']} images instead of MNIST's 60000 and 10000: split in the "
            "same proportions, but the numbers do not compare with those of ColoredMNIST. Use the whole of MNIST."
        )


class ColoredMnistMLPConfig(PreTrainedConfig):
    """Config of [`ColoredMnistMLPForImageClassification`]; the defaults are IRM's network.

    Args:
        hidden_size: width of the hidden layers.
        num_hidden_layers: number of hidden layers, at least 1.
        image_size: height and width of the images in pixels.
        num_channels: channels of the images, at least 2: red and green are used.
        subsample: keep every so many-th pixel of a row and of a column, at least 1.
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
    """The multi-layer perceptron of IRM's ColoredMNIST: 2·14·14 = 392, 390, 390, classes; ReLU.

    The weights start as Xavier's uniform, the biases at zero, as IRM's do. IRM's own has one
    output and a binary loss; this one has an output per class and the cross-entropy.

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
            pixel_values: shape (B, num_channels, image_size, image_size); IRM's are in 0..1.
            labels: class ids, int64, shape (B,).
            **kwargs: for the loss, e.g. `num_items_in_batch`.

        Returns:
            `logits`, shape (B, num_labels), and with labels the `loss`.

        Raises:
            ValueError: images of another size.
        """
        wanted = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}, but this model takes (batch, {wanted[0]}, {wanted[1]}, "
                f"{wanted[2]}). Set the size of the image processor, or image_size and num_channels of the config."
            )
        step = self.config.subsample
        logits = self.classifier(self.hidden(pixel_values[:, :2, ::step, ::step].flatten(1)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(ColoredMnistMLPConfig.model_type, ColoredMnistMLPConfig)
AutoModelForImageClassification.register(ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification)
