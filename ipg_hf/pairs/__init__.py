# SPDX-License-Identifier: Apache-2.0
"""What a pair data set is, how it is drawn from, and how to make one."""

from .loader import PairCollator, PairLoader, PairSampler
from .makers import pairs_from_render
from .transforms import ImageRows

__all__ = ["ImageRows", "PairCollator", "PairLoader", "PairSampler", "pairs_from_render"]
