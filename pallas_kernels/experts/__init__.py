"""Kernels of a mixture of experts: sort tokens by expert, multiply in blocks, bring them back.

Each token is an item; `make_group_metadata` gives it a row so that each expert's rows start on a
block boundary. `dispatch` moves items to their rows, `grouped_matmul` and `gated_matmul` multiply
each block by its expert's matrix, and `combine` moves rows back to items. `plan_exchange`, `send`
and `send_back` move items between devices.
"""

from pallas_kernels.experts.exchange import ExchangePlan, plan_exchange, send, send_back
from pallas_kernels.experts.group_metadata import GroupMetadata, block_rows, make_group_metadata
from pallas_kernels.experts.grouped import (
    gated_matmul,
    grouped_implementation,
    grouped_matmul,
    rows_of_blocks,
)
from pallas_kernels.experts.moves import combine, dispatch, move_implementation

__all__ = [
    "ExchangePlan",
    "GroupMetadata",
    "block_rows",
    "combine",
    "dispatch",
    "gated_matmul",
    "grouped_implementation",
    "grouped_matmul",
    "make_group_metadata",
    "move_implementation",
    "plan_exchange",
    "rows_of_blocks",
    "send",
    "send_back",
]
