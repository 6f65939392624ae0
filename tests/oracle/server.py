"""Answers requests for transformers' logits, one JSON object a line, so that torch loads once.

Runs in the oracle's environment. A request names `checkpoint`, `tokens` (npz), `output` (npz to
write), `decode_from` and `greedy`; the answer is `{}` or `{"error": ...}`.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import hf_logits


def answer(request):
    tokens = hf_logits.read_tokens(request["tokens"])
    model = hf_logits.load(request["checkpoint"])
    start = request["decode_from"]
    np.savez(
        request["output"],
        full=hf_logits.full_logits(model, tokens),
        decode=hf_logits.decode_logits(model, tokens, start),
        greedy=hf_logits.greedy(model, tokens[:, :start], request["greedy"]),
    )


def main():
    for line in sys.stdin:
        try:
            answer(json.loads(line))
            print("{}", flush=True)
        except (OSError, ValueError) as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
