"""Adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`."""

from jaxmoe.checkpoint.peft.merging import Merging
from jaxmoe.checkpoint.peft.reader import PeftAdapter, adapter_digest, read_adapter
from jaxmoe.checkpoint.peft.several import add_adapters, read_adapters
from jaxmoe.checkpoint.peft.writer import write_adapter

__all__ = [
    "Merging",
    "PeftAdapter",
    "adapter_digest",
    "add_adapters",
    "read_adapter",
    "read_adapters",
    "write_adapter",
]
