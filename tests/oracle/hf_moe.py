"""One MoE layer of a Hugging Face checkpoint by transformers: fp32, CPU.

Runs in the oracle's environment (torch, transformers) and imports nothing of this project.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe


@torch.inference_mode()
def layer_outputs(checkpoint, index, x):
    """What layer `index` makes of float32 [batch, length, embed]: the same, and router logits."""
    config = Llama4TextConfig(**json.loads((Path(checkpoint) / "config.json").read_text()))
    prefix = f"model.layers.{index}.feed_forward."
    tensors = load_file(Path(checkpoint) / "model.safetensors")
    layer = Llama4TextMoe(config).float()
    layer.load_state_dict(
        {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
    )
    out, logits = layer(torch.as_tensor(x))
    return out.reshape(x.shape).numpy(), logits.reshape(*x.shape[:2], -1).numpy()
