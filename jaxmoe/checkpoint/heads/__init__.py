"""EAGLE-3 heads: published ones in, the project's own on disk, and published ones out.

`convert_head` makes a checkpoint that `load_head` puts on any mesh, and `write_head` writes the
published layout, which SGLang and vLLM read.
"""

from jaxmoe.checkpoint.heads.convert import convert_head, is_head
from jaxmoe.checkpoint.heads.store import Head, check_head, load_head, read_head_config
from jaxmoe.checkpoint.heads.writer import write_head

__all__ = [
    "Head",
    "check_head",
    "convert_head",
    "is_head",
    "load_head",
    "read_head_config",
    "write_head",
]
