# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: data with a spurious attribute, ready to train on and to measure with."""

from collections.abc import Callable

from .colored_mnist import ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification, load_colored_mnist
from .digits import Benchmark, load_digits

LOADERS: dict[str, Callable[..., Benchmark]] = {"digits": load_digits, "colored_mnist": load_colored_mnist}

__all__ = [
    "LOADERS",
    "Benchmark",
    "ColoredMnistMLPConfig",
    "ColoredMnistMLPForImageClassification",
    "load_colored_mnist",
    "load_digits",
]
