"""Losses and gradients of a Hugging Face checkpoint by transformers: fp32, CPU.

Runs in the oracle's environment (torch, transformers) and imports nothing of this project.
"""

import numpy as np
import torch


def gradients(model, tokens, segment_ids, labels, z_loss):
    """The loss of packed rows, and the gradient of every parameter by name.

    Documents are judged one by one, each alone. The loss is transformers' own, summed and divided
    by the targets of all, and `z_loss` times the mean squared log-sum-exp of the same places.

    Args:
        tokens, segment_ids, labels: int32 [rows, length]; segment 0 is padding, and a label of -100
            is no target. A document's first label is none either.
    """
    documents = [(row, i) for row, ids in enumerate(segment_ids) for i in np.unique(ids[ids != 0])]
    parts = [np.flatnonzero(segment_ids[row] == i) for row, i in documents]
    counted = [labels[row][places] for (row, _), places in zip(documents, parts, strict=True)]
    count = sum(int((label[1:] != -100).sum()) for label in counted)
    total = 0.0
    for (row, _), places, label in zip(documents, parts, counted, strict=True):
        ids = torch.as_tensor(tokens[row][places]).long()[None]
        label = torch.as_tensor(label).long()[None]
        out = model(ids, labels=label, num_items_in_batch=count, use_cache=False)
        squares = torch.logsumexp(out.logits[:, :-1], -1)[label[:, 1:] != -100] ** 2
        loss = out.loss + z_loss * squares.sum() / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.numpy() for name, p in model.named_parameters()}
