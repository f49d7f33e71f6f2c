# SPDX-License-Identifier: Apache-2.0
"""Finds which parts of the images a model follows, without an attribute, masks or labels."""

from .measure import LEAST_IMAGES, Example, Finding, Scan, scan
from .page import check_folder, first_suspect, read_scan, recipe_against, scan_table, write_scan
from .properties import FileProperty
from .source import load_images

__all__ = [
    "LEAST_IMAGES",
    "Example",
    "FileProperty",
    "Finding",
    "Scan",
    "check_folder",
    "first_suspect",
    "load_images",
    "read_scan",
    "recipe_against",
    "scan",
    "scan_table",
    "write_scan",
]
