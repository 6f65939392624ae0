"""Makes tests/golden/*.npz: what Hugging Face transformers computes for tiny random models.

Each case is small enough to commit and chosen so that a mistake implementations are known to make
moves its logits by more than 0.01 (tests/test_reference.py holds it to that). Run it with the
oracle's interpreter after changing a case or how tests/tiny.py draws weights:

    .venv-oracle/bin/python scripts/make_golden.py [CASE ...]
"""

import dataclasses
import sys
import tempfile

import numpy as np

from tests import tiny, vision
from tests.golden import make_vision
from tests.oracle import hf_logits
from tests.oracle.draw import ROUNDING, router_gap


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how many tokens of which it is asked about; see `tiny.Golden`."""

    config: dict
    seed: int = 0
    length: int = 60  # 3.75 chunks of 16
    batch: int = 1
    first_row: int = 0
    router_gap: float = ROUNDING  # between the logits of an expert and the next; from first_row on
    decode_from: int = 0
    prompt: int = 0
    new_tokens: int = 0


def complete(config):
    """A case with every kind of result."""
    return Case(config, batch=2, decode_from=10, prompt=10, new_tokens=48)


def still(like, **overrides):
    """A short model without temperature, so that its golden file fails for one reason."""
    return like(**{"num_hidden_layers": 4, "attn_temperature_tuning": False, **overrides})


def slow(like, **overrides):
    """Slow rotations need distance to show: longer chunks."""
    return Case(still(like, attention_chunk_size=32, **overrides), length=112)


CASES = {
    "scout": complete(tiny.scout_like()),
    "maverick": complete(tiny.maverick_like()),
    # Frequency scaling: a hard threshold, a ramp, and none.
    "rope_factors": slow(tiny.scout_like),
    "rope_ramp": slow(tiny.scout_like, rope_scaling=tiny.rope_scaling(8.0, 1.0, 4.0)),
    "rope_unscaled": slow(tiny.maverick_like),
    # Which layers are local, and what a local layer sees.
    "chunk_layers": Case(still(tiny.scout_like, num_hidden_layers=8)),
    "global_layers": Case(still(tiny.maverick_like, num_hidden_layers=9)),
    "layer_lists": Case(
        still(
            tiny.scout_like,
            num_hidden_layers=6,
            no_rope_layers=[1, 0, 0, 1, 1, 0],
            moe_layers=[0, 3, 4],
        )
    ),
    # The first step is at position 519; rounded to bfloat16, position 518 is already past it.
    "temperature_edge": Case(
        tiny.scout_like(num_hidden_layers=4, floor_scale=520, attn_scale=0.4),
        length=524,
        first_row=512,
    ),
    "temperature_steps": Case(
        tiny.maverick_like(num_hidden_layers=4, floor_scale=5, attn_scale=0.3)
    ),
    # An eps large enough that a constant in its place shows.
    "qk_norm": Case(still(tiny.scout_like, rms_norm_eps=0.1)),
    # Chunks and temperature as they are released; one expert, since rounding would choose between
    # two for some of so many tokens.
    "long/document": Case(
        tiny.scout_like(
            num_hidden_layers=4,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=1,
            vocab_size=1024,
            attention_chunk_size=8192,
            floor_scale=8192,
            max_position_embeddings=32768,
        ),
        seed=1,
        length=20_000,
        first_row=19_984,
        prompt=20_000,
        new_tokens=24,
    ),
    # Sizes that TPU kernels take, and weights that bfloat16 holds.
    "wide_heads": Case(
        tiny.scout_like(
            num_hidden_layers=2,
            no_rope_layers=[1, 0],
            moe_layers=[1],
            hidden_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            intermediate_size=256,
            intermediate_size_mlp=256,
            attention_chunk_size=128,
            floor_scale=64,
            torch_dtype="bfloat16",
        ),
        length=280,
        batch=2,
        first_row=264,
        router_gap=0.05,
    ),
    "router": Case(still(tiny.scout_like)),
    "router_top2": Case(still(tiny.maverick_like, num_experts_per_tok=2)),
}


def compute(case):
    """The `tiny.Golden` of a case.

    Raises:
        ValueError: Rounding decides one of its choices, or transformers contradicts itself.
    """
    tensors = tiny.random_tensors(case.config, case.seed)
    generator = np.random.Generator(np.random.PCG64([case.seed, 1]))
    shape, vocab = (case.batch, case.length), case.config["vocab_size"]
    tokens = generator.integers(0, vocab, shape, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        model = hf_logits.load(tiny.write_checkpoint(folder, case.config, tensors))
    logits = hf_logits.full_logits(model, tokens)
    choices = case.config["num_local_experts"] > 1
    gaps = (router_gap(case.config, tensors, tokens, first) for first in (0, case.first_row))
    if choices and any(x < y for x, y in zip(gaps, (ROUNDING, case.router_gap), strict=True)):
        raise ValueError("two experts nearly tie: choose another seed")
    return tiny.Golden(
        config=case.config,
        seed=case.seed,
        checksum=tiny.checksum(tensors),
        tokens=tokens,
        first_row=case.first_row,
        logits=logits[:, case.first_row :],
        **(decoded(model, case, tokens, logits) if case.decode_from else {}),
        **(continued(model, case, tokens) if case.prompt else {}),
    )


def decoded(model, case, tokens, logits):
    steps = hf_logits.decode_logits(model, tokens, case.decode_from)
    if abs(steps - logits).max() > 2e-5:
        raise ValueError("transformers decodes other logits than it prefills")
    return {"decode_from": case.decode_from, "decode_logits": steps[:, case.decode_from :]}


def continued(model, case, tokens):
    greedy = hf_logits.greedy(model, tokens[:, : case.prompt], case.new_tokens)
    whole = np.concatenate([tokens[:, : case.prompt], greedy], axis=1)
    ordered = np.sort(hf_logits.full_logits(model, whole)[:, case.prompt - 1 : -1])
    if (ordered[..., -1] - ordered[..., -2]).min() < 1e-3:
        raise ValueError("two next tokens nearly tie: choose another seed")
    if min(len(set(row)) for row in greedy.tolist()) < case.new_tokens // 2:
        raise ValueError("the continuation repeats itself: choose another seed")
    return {"prompt": case.prompt, "greedy": greedy}


def main():
    for name in sys.argv[1:] or [*CASES, *make_vision.LIKE]:
        try:
            if name in make_vision.LIKE:
                vision.write_golden(name, make_vision.compute(name))
            else:
                tiny.write_golden(name, compute(CASES[name]))
        except (KeyError, ValueError) as error:
            sys.exit(f"error: {name}: {error}")
        print(f"{name}: {(tiny.GOLDEN / f'{name}.npz').stat().st_size / 1024:.0f} KiB")
