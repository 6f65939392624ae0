"""Adapters of PEFT beside a model of transformers: fp32, CPU.

Runs in the oracle's environment (torch, transformers, peft) and imports nothing of this project.
"""

import peft
import torch


def with_adapter(model, folder, lora, version):
    """The model with the adapter of a folder, or with a random one that is saved there.

    Args:
        lora: arguments of `LoraConfig`, for a random adapter; None to read the folder.
        version: of PEFT, which must be the one that is imported.
    """
    if peft.__version__ != version:
        raise ValueError(f"peft {peft.__version__} is imported, not {version}")
    if lora is None:
        return peft.PeftModel.from_pretrained(model, folder).eval()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return adapted
