"""A mixture of experts: rows sorted by expert, moved there and back, and multiplied by blocks."""

from pallas_kernels.experts.exchange import ExchangePlan, plan_exchange, send, send_back
from pallas_kernels.experts.grouped import gated_matmul, grouped_implementation, grouped_matmul
from pallas_kernels.experts.moves import combine, dispatch, move_implementation
from pallas_kernels.experts.plan import GroupPlan, block_rows, plan_groups

__all__ = [
    "ExchangePlan",
    "GroupPlan",
    "block_rows",
    "combine",
    "dispatch",
    "gated_matmul",
    "grouped_implementation",
    "grouped_matmul",
    "move_implementation",
    "plan_exchange",
    "plan_groups",
    "send",
    "send_back",
]
