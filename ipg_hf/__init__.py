# SPDX-License-Identifier: Apache-2.0
"""Invariance pair-guided learning for Hugging Face `Trainer` (arXiv 2502.18975)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import IPGConfig
    from .heads import ClassifierHead, find_head
    from .models import load_image_classifier
    from .trainer import IPGTrainer

__version__ = "0.2.0"

__all__ = ["ClassifierHead", "IPGConfig", "IPGTrainer", "find_head", "load_image_classifier"]

_HOMES = {
    "ClassifierHead": "heads",
    "IPGConfig": "config",
    "IPGTrainer": "trainer",
    "find_head": "heads",
    "load_image_classifier": "models",
}


if not TYPE_CHECKING:  # which would take every name for one of ours

    def __getattr__(name: str) -> Any:
        # transformers' Trainer takes seconds to import: `ipg --help` and a wrong command do not wait for it (PEP 562)
        if name in _HOMES:
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        if not name.startswith("_"):
            try:
                return import_module(f".{name}", __name__)
            except ModuleNotFoundError as failure:
                if failure.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
