"""Attention of many queries (`flash_attention`) and of a few against a cache (`decode_attention`).

Who sees whom is data: `Coords`, the position and segment of each token.
"""

from pallas_kernels.attention.decode import decode_attention, decode_implementation
from pallas_kernels.attention.flash import flash_attention, flash_implementation
from pallas_kernels.attention.masks import Coords, coords_of, reach, visible
from pallas_kernels.attention.merge import lse_weight, merge, merge_with_lse
from pallas_kernels.attention.pages import rows_of_pages

__all__ = [
    "Coords",
    "coords_of",
    "decode_attention",
    "decode_implementation",
    "flash_attention",
    "flash_implementation",
    "lse_weight",
    "merge",
    "merge_with_lse",
    "reach",
    "rows_of_pages",
    "visible",
]
