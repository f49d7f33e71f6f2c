# SPDX-License-Identifier: Apache-2.0
"""Measure any model on a benchmark: numbers, figures and a page."""
