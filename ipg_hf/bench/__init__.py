# SPDX-License-Identifier: Apache-2.0
"""Suites: methods compared on one benchmark, their runs, tables and figures."""
