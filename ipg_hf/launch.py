# SPDX-License-Identifier: Apache-2.0
"""What a guided step cannot be launched with."""

from accelerate import Accelerator
from accelerate.utils import DistributedType


def check_launch(
    accelerator: Accelerator, devices: int = 1, is_model_parallel: bool = False, optim: str = "adamw_torch"
) -> None:
    """Raises ValueError, naming what to use instead, for launchers and optimizers with which no guided step is exact.

    Args:
        accelerator: the processes.
        devices: that this one process drives (`TrainingArguments.n_gpu`).
        is_model_parallel: whether the model's layers lie on several of them (`Trainer.is_model_parallel`).
        optim: the optimizer (`TrainingArguments.optim`).
    """
    kind, plugin = accelerator.distributed_type, getattr(accelerator.state, "fsdp_plugin", None)
    instead = "Use plain data parallelism (accelerate launch --multi_gpu) or FSDP2 (--use_fsdp --fsdp_version 2)."
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"IPGTrainer with pairs does not run under {kind.value}, whose engine takes each backward as one step of "
            f"the optimizer, while a guided step has two of each. {instead}"
        )
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(f"IPGTrainer with pairs does not run under FSDP1, whose parameters are flattened. {instead}")
    if devices > 1 or is_model_parallel:
        raise ValueError(
            f"IPGTrainer with pairs takes one device a process, and this one has {devices} (torch.nn.DataParallel) or "
            f"a model spread over several. {instead}"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(f"IPGTrainer with pairs does not run under tensor or context parallelism. {instead}")
    if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
        whole = optim.removesuffix("_layerwise") if optim.endswith("_layerwise") else "adamw_torch"
        raise ValueError(
            f"IPGTrainer with pairs does not take optim={optim!r}, which moves the parameters within each "
            f"backward, while a guided step scales and clips two whole gradients. Use {whole!r}, say."
        )
