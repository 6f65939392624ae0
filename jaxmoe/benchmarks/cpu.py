"""`jaxmoe benchmark cpu`: prefill and greedy decode against transformers, on the same weights."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.benchmarks.oracle import machine, oracle_python, run_script, write_model
from jaxmoe.benchmarks.timing import today, versions, write_json
from jaxmoe.config import Llama4Config, RopeScaling, layer_kinds
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.model.params import init_params, num_params
from jaxmoe.progress import task_progress

MODEL = Llama4Config(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    intermediate_size_mlp=2048,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=16,
    layers=layer_kinds(8),
    rope_scaling=RopeScaling(),
    bos_token_id=0,
    eos_token_ids=(1,),
    pad_token_id=2,
)


def run_cpu(args: argparse.Namespace) -> None:
    """Measures, writes the figures and prints them."""
    jax.config.update("jax_platforms", "cpu")
    figures = benchmark_cpu(args, oracle_python())
    write_json(args.output, figures)
    Console().print(cpu_table(figures))


def benchmark_cpu(args: argparse.Namespace, oracle: str) -> dict:
    """Times both libraries alternately on the same weights and prompt; returns the figures."""
    params = init_params(MODEL, jax.random.key(0), jnp.float32)
    prompt = np.random.default_rng(0).integers(3, MODEL.vocab_size, (1, args.prompt_tokens))
    sides: dict[str, list[dict]] = {"jaxmoe": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = write_model(Path(folder), MODEL, params), Path(folder) / "tokens.npy"
        np.save(tokens, prompt.astype(np.int32))
        with task_progress("Rounds", args.rounds, "rounds") as advance:
            for _ in range(args.rounds):
                sides["jaxmoe"].append(_time_ours(params, prompt, args))
                sides["transformers"].append(_time_oracle(oracle, model, tokens, args))
                advance(1)
    return _figures(args, sides)


def _time_ours(params: dict, prompt: np.ndarray, args: argparse.Namespace) -> dict:
    """Seconds of prefill and decode of each repeat, as `hf_speed.py` prints for transformers.

    The prefill ends when the first token is on the host.
    """
    prefill, decode, tokens = [], [], []
    request = Request("0", tuple(prompt[0].tolist()), args.new_tokens)
    for repeat in range(args.repeats + 1):
        tokens, times = [], [time.perf_counter()]
        for token in generate(
            MODEL,
            params,
            [request],
            Sampling(temperature=0),
            step_tokens=prompt.shape[1],
            stop_ids=(),
            drafts=0,  # transformers has none
        ):
            tokens.append(token.token)
            times.append(time.perf_counter())
        if repeat:  # the first run compiles
            prefill.append(times[1] - times[0])
            decode.append(times[-1] - times[1])
    return {"prefill": prefill, "decode": decode, "tokens": tokens}


def _time_oracle(oracle: str, model: Path, tokens: Path, args: argparse.Namespace) -> dict:
    flags = "--new-tokens", args.new_tokens, "--repeats", args.repeats
    return run_script(oracle, "hf_speed.py", model, tokens, *flags)


def _figures(args: argparse.Namespace, sides: dict[str, list[dict]]) -> dict:
    def median(side: str, phase: str) -> float:
        return statistics.median(second for runs in sides[side] for second in runs[phase])

    phases = ("prefill", "decode")
    seconds = {side: {phase: median(side, phase) for phase in phases} for side in sides}
    ours, theirs = seconds["jaxmoe"], seconds["transformers"]
    return {
        "date": today(),
        "machine": machine(),
        "versions": {
            **versions(),
            "torch": sides["transformers"][0]["torch"],
            "transformers": sides["transformers"][0]["transformers"],
        },
        "parameters": num_params(MODEL),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repeats": args.rounds * args.repeats,
        "median_seconds": seconds,
        "decode_tokens_per_second": {
            side: (args.new_tokens - 1) / seconds[side]["decode"] for side in seconds
        },
        "times_faster": {phase: theirs[phase] / ours[phase] for phase in ours},
        "same_tokens": sides["jaxmoe"][0]["tokens"] == sides["transformers"][0]["tokens"],
    }


def cpu_table(figures: dict) -> Table:
    """The figures as a table to print."""
    table = Table(title=f"{figures['parameters'] / 1e6:.0f}M parameters, float32, batch 1")
    for column in ("", "jaxmoe", "transformers", "times faster"):
        table.add_column(column, justify="left" if not column else "right")
    seconds, rate = figures["median_seconds"], figures["decode_tokens_per_second"]
    ratio = figures["times_faster"]
    prompt = f"prefill of {figures['prompt_tokens']} tokens, s"
    prefill = [f"{seconds[side]['prefill']:.2f}" for side in ("jaxmoe", "transformers")]
    table.add_row(prompt, *prefill, f"{ratio['prefill']:.1f}")
    decode = [f"{rate[side]:.1f}" for side in ("jaxmoe", "transformers")]
    table.add_row("greedy decode, tokens/s", *decode, f"{ratio['decode']:.1f}")
    same = "identical" if figures["same_tokens"] else "DIFFERENT"
    table.caption = f"Greedy tokens: {same}. Medians of {figures['repeats']} runs."
    return table
