"""Times transformers on a checkpoint: prefill and greedy decode. Runs in the oracle's environment.

Prints one JSON object: seconds of each repeat, and the greedy tokens.
"""

import argparse
import json
import time

import numpy as np
import torch
import transformers


@torch.inference_mode()
def measure(model, tokens, new_tokens):
    """Generates greedily; returns (seconds of prefill, seconds of decode, the new tokens)."""
    start = time.perf_counter()
    out = model(tokens, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    prefilled = time.perf_counter()
    generated = [token]
    for _ in range(new_tokens - 1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        generated.append(token)
    return prefilled - start, time.perf_counter() - prefilled, torch.cat(generated, 1)[0].tolist()


def main():
    """Times the checkpoint and prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("tokens", help="npy file, int32 [1, length]")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    model = transformers.Llama4ForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    tokens = torch.as_tensor(np.load(args.tokens)).long()
    measure(model, tokens, 2)  # warm-up
    runs = [measure(model, tokens, args.new_tokens) for _ in range(args.repeats)]
    prefill, decode, generated = zip(*runs, strict=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"prefill": prefill, "decode": decode, "tokens": generated[0], **versions}))


if __name__ == "__main__":
    main()
