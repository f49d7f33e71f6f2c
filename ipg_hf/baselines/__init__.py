# SPDX-License-Identifier: Apache-2.0
"""Other people's methods and the paper's ablations, to compare with.

Each method is in one file, with a config of its own and a trainer that extends `IPGTrainer`. `IPGTrainer` needs none of
them, except through `moved.py` in this release. GroupDRO and re-weighting are task losses, in `losses.py`. `degrade.py`
is no method: it spoils pairs.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..config import IPGConfig
from ..trainer import IPGTrainer
from .ablations import AblationConfig, AblationTrainer
from .degrade import degrade_pairs
from .dfr import DFRConfig, DFRTrainer
from .environments import EnvironmentConfig, EnvironmentTrainer
from .jtt import JTTConfig, JTTTrainer
from .pair_penalties import PairPenaltyConfig, PairPenaltyTrainer
from .projection import ProjectionConfig, ProjectionTrainer

__all__ = [
    "METHODS",
    "AblationConfig",
    "AblationTrainer",
    "DFRConfig",
    "DFRTrainer",
    "EnvironmentConfig",
    "EnvironmentTrainer",
    "JTTConfig",
    "JTTTrainer",
    "Method",
    "PairPenaltyConfig",
    "PairPenaltyTrainer",
    "ProjectionConfig",
    "ProjectionTrainer",
    "degrade_pairs",
]


class Method(NamedTuple):
    """What a recipe's `method` stands for.

    Args:
        trainer: its trainer.
        config: the trainer's config.
        settings: settings that the method's name fixes.
        uses_pairs: whether the training pairs are given to the trainer.
    """

    trainer: type[IPGTrainer]
    config: type[IPGConfig]
    settings: Mapping[str, Any] = MappingProxyType({})
    uses_pairs: bool = True


METHODS: dict[str, Method] = {
    "ipg": Method(IPGTrainer, IPGConfig),
    "erm": Method(IPGTrainer, IPGConfig, uses_pairs=False),
    **{
        name: Method(PairPenaltyTrainer, PairPenaltyConfig, {"pair_objective": name})
        for name in ("kl", "features", "rationales", "augmentation")
    },
    **{
        name: Method(EnvironmentTrainer, EnvironmentConfig, {"objective": name}, uses_pairs=False)
        for name in ("irm", "vrex")
    },
    "dfr": Method(DFRTrainer, DFRConfig, uses_pairs=False),
    "project": Method(ProjectionTrainer, ProjectionConfig),
    "jtt": Method(JTTTrainer, JTTConfig, uses_pairs=False),
    "ablation": Method(AblationTrainer, AblationConfig),
}
