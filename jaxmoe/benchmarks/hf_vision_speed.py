"""Times transformers' vision tower and projector. Runs in the oracle's environment.

Prints one JSON object: seconds of each repeat.
"""

import argparse
import json
import time

import numpy as np
import torch
import transformers


@torch.inference_mode()
def measure(model, pixels):
    """Seconds for tiles uint8 [tiles, side, side, 3], and their features."""
    start = time.perf_counter()
    scaled = (torch.as_tensor(pixels).float() - 127.5) / 127.5
    seen = model.vision_model(scaled.permute(0, 3, 1, 2)).last_hidden_state
    features = model.multi_modal_projector(seen).numpy()
    return time.perf_counter() - start, features


def main():
    """Times the checkpoint and prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("tiles", help="npy file, uint8 [tiles, side, side, 3]")
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--output", required=True, help="npy file for the features")
    args = parser.parse_args()
    model = transformers.Llama4ForConditionalGeneration.from_pretrained(
        args.checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    pixels = np.load(args.tiles)
    _, features = measure(model, pixels)  # warm-up
    np.save(args.output, features)
    seconds = [measure(model, pixels)[0] for _ in range(args.repeats)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": seconds, **versions}))


if __name__ == "__main__":
    main()
