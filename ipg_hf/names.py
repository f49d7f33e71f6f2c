# SPDX-License-Identifier: Apache-2.0
"""What an error message says of an unknown name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 12


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message that helps whoever gave an unknown name.

    Args:
        name: the unknown name.
        known: the names that exist.

    Returns:
        The known name that was probably meant; or else all known names, if they are few; or else the nearest ones.
        The text begins with a space. It is empty if there are no known names.
    """
    names = sorted({str(name) for name in known})
    if close := get_close_matches(name, names, n=1, cutoff=0.5):
        return f" Did you mean {close[0]!r}?"
    if len(names) <= LISTED:
        return f" Known: {', '.join(names)}." if names else ""
    return f" Nearest: {', '.join(get_close_matches(name, names, n=3, cutoff=0.0))}."
