"""Answers requests for what transformers computes, one JSON object a line; torch loads once.

Runs in the oracle's environment. A request names `output`, and one of

- `checkpoint`, `tokens` (npz), `decode_from` and `greedy`, for logits;
- `checkpoint` and `tiles` (npz: of each image in order, and `tokens`), for features and logits;
- `checkpoint`, `training` (npz: tokens, segments and labels) and `z_loss`, for gradients;
- `checkpoint`, `moe_layer` (its index) and `input` (npy), for one layer's output;
- `checkpoint`, `tokens` (npz), `adapter` (a folder that PEFT reads, or with `lora`, arguments of
  its `LoraConfig`, writes) and `peft` (the version that is meant), for logits;
- `tokenizer` (a folder) and `chats` (JSON), for ids;
- `grids` and `each`, for images in a text.

The answer is `{}` or `{"error": ...}`.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import hf_chat
import hf_logits
import hf_moe
import hf_train
import hf_vision


def answer(request):
    if "chats" in request:
        hf_chat.write_ids(request["tokenizer"], request["chats"], request["output"])
    elif "grids" in request:
        hf_chat.write_layouts(request["grids"], request["each"], request["output"])
    elif "tiles" in request:
        answer_images(request)
    elif "adapter" in request:
        answer_adapter(request)
    elif "training" in request:
        answer_training(request)
    elif "moe_layer" in request:
        answer_layer(request)
    else:
        answer_logits(request)


def answer_layer(request):
    x = np.load(request["input"])
    out, logits = hf_moe.layer_outputs(request["checkpoint"], request["moe_layer"], x)
    np.savez(request["output"], out=out, logits=logits)


def answer_adapter(request):
    import hf_peft  # which takes seconds, and only some tests need

    model, version = hf_logits.load(request["checkpoint"]), request["peft"]
    adapted = hf_peft.with_adapter(model, request["adapter"], request.get("lora"), version)
    tokens = hf_logits.read_tokens(request["tokens"])
    np.save(request["output"], hf_logits.full_logits(adapted, tokens))


def answer_training(request):
    with np.load(request["training"]) as file:
        rows = [file[name] for name in file.files]
    model = hf_logits.load(request["checkpoint"])
    loss, gradients = hf_train.gradients(model, *rows, request["z_loss"])
    np.savez(request["output"], loss=loss, **gradients)


def answer_images(request):
    model = hf_logits.load(request["checkpoint"])
    with np.load(request["tiles"]) as file:
        tokens, tiles = file["tokens"], [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
    np.savez(
        request["output"],
        features=hf_vision.features(model, np.concatenate(tiles)),
        logits=hf_vision.logits(model, tokens, tiles),
    )


def answer_logits(request):
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
        except Exception as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
