# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite: offline, one thread a process (the suite runs on several)."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

torch.set_num_threads(1)
