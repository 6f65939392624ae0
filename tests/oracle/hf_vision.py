"""Features and logits of a multimodal checkpoint by transformers: fp32, CPU.

Runs in the oracle's environment (torch, transformers) and imports nothing of this project.
"""

import numpy as np
import torch


def pixel_values(tiles):
    """Tiles uint8 [n, side, side, 3] as the model takes them: [n, 3, side, side], from -1 to 1."""
    scaled = (torch.as_tensor(np.ascontiguousarray(tiles)).float() / 255 - 0.5) / 0.5
    return scaled.permute(0, 3, 1, 2)


@torch.inference_mode()
def features(model, tiles):
    """What stands in the text's sequence for each tile, float32 [n, tokens, width]."""
    seen = model.vision_model(pixel_values(tiles)).last_hidden_state
    return model.multi_modal_projector(seen).numpy()


@torch.inference_mode()
def logits(model, tokens, tiles):
    """Float32 [length, vocab] of one full forward pass; `tiles` of each image, in order."""
    pixels = pixel_values(np.concatenate(tiles)) if tiles else None
    ids = torch.as_tensor([list(tokens)]).long()
    return model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0].numpy()


def greedy(model, tokens, tiles, count):
    """The likeliest next tokens, and the least lead of one over the next likeliest."""
    written, gap = [], np.inf
    for _ in range(count):
        last = np.sort(logits(model, [*tokens, *written], tiles)[-1])
        gap = min(gap, last[-1] - last[-2])
        written.append(int(logits(model, [*tokens, *written], tiles)[-1].argmax()))
    return written, gap
