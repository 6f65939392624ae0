"""Kernels of a decode step on Hopper and TPUs, except attention: norms, projections, experts.

A step of few tokens reads every matrix once and computes little, so that its time is that of memory
and of launching kernels. Each function here is one kernel, for up to 64 tokens.
"""

from pallas_kernels.step.experts import busy_experts, experts_down, experts_gate_up
from pallas_kernels.step.heads import HeadPlan, write_heads
from pallas_kernels.step.matmul import MAX_TOKENS, matmul_few, why_not_few, why_not_widths
from pallas_kernels.step.norm import add_rms_norm, why_not_norm

__all__ = [
    "MAX_TOKENS",
    "HeadPlan",
    "add_rms_norm",
    "busy_experts",
    "experts_down",
    "experts_gate_up",
    "matmul_few",
    "why_not_few",
    "why_not_norm",
    "why_not_widths",
    "write_heads",
]
