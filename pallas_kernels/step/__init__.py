"""What a decode step does between its attention kernels, for few tokens, in few launches on Hopper.

A step of few tokens reads every matrix once and computes little: its time is that of memory and of
launching kernels. Each function here is one kernel.
"""

from pallas_kernels.step.experts import experts_down, experts_gate_up, slots_of
from pallas_kernels.step.heads import HeadPlan, write_heads
from pallas_kernels.step.matmul import MAX_TOKENS, matmul_few, why_not_few
from pallas_kernels.step.norm import add_rms_norm, why_not_norm

__all__ = [
    "MAX_TOKENS",
    "HeadPlan",
    "add_rms_norm",
    "experts_down",
    "experts_gate_up",
    "matmul_few",
    "slots_of",
    "why_not_few",
    "why_not_norm",
    "write_heads",
]
