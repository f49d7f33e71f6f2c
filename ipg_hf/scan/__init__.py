# SPDX-License-Identifier: Apache-2.0
"""Finds which parts of the images a model follows, without an attribute, masks or labels."""

from .measure import Example, Finding, Scan, scan
from .page import check_folder, guard, guarding_recipe, scan_table, write_scan
from .source import load_images

__all__ = [
    "Example",
    "Finding",
    "Scan",
    "check_folder",
    "guard",
    "guarding_recipe",
    "load_images",
    "scan",
    "scan_table",
    "write_scan",
]
