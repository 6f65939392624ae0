"""Times transformers' `generate` on requests in left-padded batches. Runs in the oracle's Python.

Prints one JSON object: seconds for all batches, and the greedy tokens of each request.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import transformers


@torch.inference_mode()
def answers(model, requests, longest=None):
    """The answers to the requests of one batch, which goes on until its longest is complete."""
    longest = longest or max(request["new_tokens"] for request in requests)
    width = max(len(request["tokens"]) for request in requests)
    tokens = torch.full((len(requests), width), model.generation_config.pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, request in enumerate(requests):
        count = len(request["tokens"])
        tokens[row, width - count :], mask[row, width - count :] = (
            torch.tensor(request["tokens"]),
            1,
        )
    out = model.generate(
        tokens, attention_mask=mask, min_new_tokens=longest, max_new_tokens=longest
    )
    assert out.shape == (len(requests), width + longest), "it has stopped early"
    new = (request["new_tokens"] for request in requests)
    return [row[width : width + n].tolist() for row, n in zip(out, new, strict=True)]


def load(checkpoint):
    """The model in float32, which generates greedily and stops at no token."""
    model = transformers.Llama4ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    pad = model.config.pad_token_id
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, use_cache=True, pad_token_id=pad if pad and pad >= 0 else 0
    )
    return model


def main():
    """Times the checkpoint and prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("requests", help="JSON: a list of objects with tokens and new_tokens")
    parser.add_argument("--batch", type=int, required=True, help="requests of a batch")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    model, requests = load(args.checkpoint), json.loads(Path(args.requests).read_text())
    batches = [requests[i : i + args.batch] for i in range(0, len(requests), args.batch)]
    answers(model, batches[0], 2)  # warm-up
    begin = time.perf_counter()
    found = [answer for batch in batches for answer in answers(model, batch)]
    seconds = time.perf_counter() - begin
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": seconds, "answers": found, **versions}))


if __name__ == "__main__":
    main()
