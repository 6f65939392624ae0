"""A mixture of experts: rows sorted by expert, moved there and back, and multiplied by blocks."""

from pallas_kernels.experts.exchange import ExchangePlan, plan_exchange, send, send_back
from pallas_kernels.experts.grouped import gated_matmul, grouped_implementation, grouped_matmul
from pallas_kernels.experts.plan import GroupPlan, block_rows, combine, dispatch, plan_groups

__all__ = [
    "ExchangePlan",
    "GroupPlan",
    "block_rows",
    "combine",
    "dispatch",
    "gated_matmul",
    "grouped_implementation",
    "grouped_matmul",
    "plan_exchange",
    "plan_groups",
    "send",
    "send_back",
]
