"""Attention of many queries (`flash_attention`) and of a few against a cache (`decode_attention`).

Which keys a query sees is data: `Coords`, the position and segment of each token, and a `Mask`.
"""

from pallas_kernels.attention.decode import decode_attention, decode_implementation
from pallas_kernels.attention.flash import flash_attention, flash_implementation
from pallas_kernels.attention.masks import (
    CAUSAL,
    ChunkedMask,
    Coords,
    KeyRange,
    Mask,
    coords_of,
    make_mask,
    visible,
)
from pallas_kernels.attention.merge import lse_weight, merge, merge_with_lse
from pallas_kernels.attention.paged import paged_attention
from pallas_kernels.attention.pages import keep_apart, rows_of_pages

__all__ = [
    "CAUSAL",
    "ChunkedMask",
    "Coords",
    "KeyRange",
    "Mask",
    "coords_of",
    "decode_attention",
    "decode_implementation",
    "flash_attention",
    "flash_implementation",
    "keep_apart",
    "lse_weight",
    "make_mask",
    "merge",
    "merge_with_lse",
    "paged_attention",
    "rows_of_pages",
    "visible",
]
