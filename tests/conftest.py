# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite: offline, one thread a process (the suite runs on several)."""

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """Leaves the imported modules out of garbage collections, which accelerate asks for often: each took 0.6 s."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Gives the modules back to the collector, so that nanobind does not report them as leaks at the end."""
    gc.unfreeze()
