"""Logits and greedy tokens of a Hugging Face checkpoint by transformers: fp32, CPU, sdpa attention.

Runs in the oracle's environment (torch, transformers) and imports nothing of this project:

    .venv-oracle/bin/python tests/oracle/hf_logits.py CHECKPOINT --tokens in.npz --output out.npy
"""

import argparse
import itertools
import sys

import numpy as np
import torch
from transformers import AutoConfig, Llama4ForCausalLM, Llama4ForConditionalGeneration


def load(checkpoint):
    """The model in eval mode, with its vision tower where it has one.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape, so that transformers would
            have drawn it at random or left it out.
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    has_vision = config.model_type == "llama4"
    kind = Llama4ForConditionalGeneration if has_vision else Llama4ForCausalLM
    model, report = kind.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, found)) for kind, found in report.items() if found}
    if wrong:
        raise ValueError(f"{checkpoint} does not match its config.json: {wrong}")
    return model.eval()


@torch.inference_mode()
def full_logits(model, tokens):
    """Logits of one full forward pass, float32 [batch, length, vocab]."""
    return model(torch.as_tensor(tokens).long(), use_cache=False).logits.numpy()


@torch.inference_mode()
def decode_logits(model, tokens, start):
    """The same through the cache: `start` tokens at once, then one at a time."""
    tokens = torch.as_tensor(tokens).long()
    edges = [0, *range(start, tokens.shape[1] + 1)]
    cache, steps = None, []
    for begin, end in itertools.pairwise(edges):
        out = model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return torch.cat(steps, 1).numpy()


@torch.inference_mode()
def greedy(model, tokens, count):
    """The `count` likeliest next tokens, one after another, int32 [batch, count]; never stops."""
    step, cache, found = torch.as_tensor(tokens).long(), None, []
    for _ in range(count):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step = out.logits[:, -1:].argmax(-1)
        found.append(step)
    return torch.cat(found, 1).numpy().astype(np.int32)


def read_tokens(path):
    """int32 `tokens` [batch, length] of an npz file.

    Raises:
        ValueError: Rows are padded or packed: transformers misplaces the temperature there.
    """
    with np.load(path) as file:
        if "segment_ids" in file and (file["segment_ids"] != file["segment_ids"][0, 0]).any():
            raise ValueError(f"{path} is padded or packed, where transformers is no judge")
        return file["tokens"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", required=True, metavar="IN.npz")
    parser.add_argument("--output", required=True, metavar="OUT.npy")
    parser.add_argument("--decode-from", type=int, metavar="N", help="prefill N, then step")
    parser.add_argument("--greedy", type=int, default=0, metavar="N", help="continue by N tokens")
    parser.add_argument("--greedy-output", metavar="OUT.npy")
    arguments = parser.parse_args()
    if (arguments.greedy > 0) != (arguments.greedy_output is not None):
        parser.error("--greedy and --greedy-output go together")
    return arguments


def main():
    arguments = parse_arguments()
    tokens = read_tokens(arguments.tokens)
    if arguments.decode_from and not 0 < arguments.decode_from <= tokens.shape[1]:
        raise ValueError(f"--decode-from must be 1 to {tokens.shape[1]}")
    model = load(arguments.checkpoint)
    if arguments.decode_from:
        np.save(arguments.output, decode_logits(model, tokens, arguments.decode_from))
    else:
        np.save(arguments.output, full_logits(model, tokens))
    if arguments.greedy:
        np.save(arguments.greedy_output, greedy(model, tokens, arguments.greedy))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
