# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: data sets with a spurious attribute, for training and evaluation."""

from collections.abc import Callable

from .about import ABOUT, About, describe
from .benchmark import Benchmark
from .celeba import load_celeba
from .colored_mnist import ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification, load_colored_mnist
from .digit_variants import load_marked_digits, load_stroke_mass
from .digits import load_digits
from .files import load_files, load_hub
from .scenes import load_scenes
from .waterbirds import load_waterbirds

LOADERS: dict[str, Callable[..., Benchmark]] = {
    "digits": load_digits,
    "marked_digits": load_marked_digits,
    "stroke_mass": load_stroke_mass,
    "colored_mnist": load_colored_mnist,
    "waterbirds": load_waterbirds,
    "celeba": load_celeba,
    "scenes": load_scenes,
    "files": load_files,
}

__all__ = [
    "ABOUT",
    "LOADERS",
    "About",
    "Benchmark",
    "ColoredMnistMLPConfig",
    "ColoredMnistMLPForImageClassification",
    "describe",
    "load_celeba",
    "load_colored_mnist",
    "load_digits",
    "load_files",
    "load_hub",
    "load_marked_digits",
    "load_scenes",
    "load_stroke_mass",
    "load_waterbirds",
]
