"""Whether a decode step runs on the fused kernels of `jaxmoe/model/decode_step.py`."""

from jaxmoe.mesh import MeshConfig
from jaxmoe.model.decode_step import why_not_sizes
from jaxmoe.plan.share import device_share
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work

HOPPER = ("h100", "h200")


def is_few_launches(work: Work, mesh: MeshConfig, target: Target) -> bool:
    """Whether a step decodes in few launches, since Hopper runs it with the fused kernels."""
    return work.task == "decode" and target.compiler in HOPPER and is_fused(work, mesh)


def is_fused(work: Work, mesh: MeshConfig) -> bool:
    """Whether the fused kernels of `jaxmoe/model/decode_step.py` serve a decode step in bf16."""
    share = device_share(work, mesh)
    return (
        work.format is None
        and share.exchange == "replicated"
        and why_not_sizes(work.config, mesh.tensor, share.tokens) is None
    )
