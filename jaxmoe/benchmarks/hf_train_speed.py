"""Times transformers' training steps on a checkpoint. Runs in the oracle's environment.

Prints one JSON object: seconds of each step, and the loss before the first.
"""

import argparse
import json
import time

import numpy as np
import torch
import transformers


def take_step(model, optimizer, tokens):
    """Seconds of forward, backward and AdamW's update, and the loss before it."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return time.perf_counter() - start, loss.item()


def main():
    """Times the checkpoint and prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("tokens", help="npy file, int32 [rows, length]")
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    model = transformers.Llama4ForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.as_tensor(np.load(args.tokens)).long()
    _, first = take_step(model, optimizer, tokens)  # warm-up
    seconds = [take_step(model, optimizer, tokens)[0] for _ in range(args.repeats)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": seconds, "loss": first, **versions}))


if __name__ == "__main__":
    main()
