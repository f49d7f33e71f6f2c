# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: data with a spurious attribute, ready to train on and to measure with."""

from collections.abc import Callable

from .about import ABOUT, About
from .colored_mnist import ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification, load_colored_mnist
from .digit_variants import load_marked_digits, load_stroke_mass
from .digits import Benchmark, load_digits
from .files import load_files

LOADERS: dict[str, Callable[..., Benchmark]] = {
    "digits": load_digits,
    "marked_digits": load_marked_digits,
    "stroke_mass": load_stroke_mass,
    "colored_mnist": load_colored_mnist,
    "files": load_files,
}

__all__ = [
    "ABOUT",
    "LOADERS",
    "About",
    "Benchmark",
    "ColoredMnistMLPConfig",
    "ColoredMnistMLPForImageClassification",
    "load_colored_mnist",
    "load_digits",
    "load_files",
    "load_marked_digits",
    "load_stroke_mass",
]
