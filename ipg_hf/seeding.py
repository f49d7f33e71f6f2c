# SPDX-License-Identifier: Apache-2.0
"""Seeds the global random generators for a block."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within the block, the global generators are seeded from the key. After it, they have their former states.

    Args:
        *key: non-negative integers. They seed the generators of `random`, numpy and torch (CPU).
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])
    torch.default_generator.manual_seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def first_row(dataset: Any) -> Any:
    """Returns the first row of a map-style set. A random transform of the user's own leaves the generators alone."""
    with seeded(0):
        return dataset[0]
