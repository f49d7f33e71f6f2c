# SPDX-License-Identifier: Apache-2.0
"""Invariance pairs: making, checking, showing and loading them."""

from .adversarial import AdversarialPairs
from .edits import background_pairs, overlay_pairs, recolor_pairs
from .exchanging import exchange_pairs
from .extending import extend_pairs
from .generating import generate_pairs, label_classifier, label_neighbors
from .linter import Finding, check_pairs, format_findings
from .loader import PairCollator, PairLoader, PairSampler
from .makers import pairs_from_render
from .masking import add_masks
from .matching import match_pairs
from .mixing import mix_pairs
from .preview import preview_pairs
from .scores import score_pairs
from .sources import pairs_from_columns, pairs_from_folders, pairs_from_table
from .transforms import ImageRows

__all__ = [
    "AdversarialPairs",
    "Finding",
    "ImageRows",
    "PairCollator",
    "PairLoader",
    "PairSampler",
    "add_masks",
    "background_pairs",
    "check_pairs",
    "exchange_pairs",
    "extend_pairs",
    "format_findings",
    "generate_pairs",
    "label_classifier",
    "label_neighbors",
    "match_pairs",
    "mix_pairs",
    "overlay_pairs",
    "pairs_from_columns",
    "pairs_from_folders",
    "pairs_from_render",
    "pairs_from_table",
    "preview_pairs",
    "recolor_pairs",
    "score_pairs",
]
