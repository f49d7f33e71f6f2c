# SPDX-License-Identifier: Apache-2.0
"""Invariance pair-guided learning for Hugging Face `Trainer` (arXiv 2502.18975)."""

__version__ = "0.2.0"

from .config import IPGConfig
from .heads import ClassifierHead, find_head
from .models import load_image_classifier
from .trainer import IPGTrainer

__all__ = ["ClassifierHead", "IPGConfig", "IPGTrainer", "find_head", "load_image_classifier"]
