"""Compiles training steps for absent hardware; their memory is in benchmarks/train-memory.json.

`scripts/train_memory.py 0 3` compiles those of `CASES`; without numbers the formula's side of all
figures is computed again. `scripts/tables.py` writes the table into docs/training.md.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import jax

from jaxmoe.config import PRESETS
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.memory import memory
from jaxmoe.plan.targets import Target, parse_target
from jaxmoe.plan.work import Work, default_run

FIGURES = Path(__file__).parent / "train-memory.json"


def case(task: str, layers: int, target: str, mesh: str, rows: int, context: int, **more) -> dict:
    """A step of Scout's first layers; `more` are `weights`, and fields of the run's default."""
    named = {"task": task, "layers": layers, "target": target, "mesh": mesh}
    return {**named, "rows": rows, "context": context, **more}


EVERYWHERE = {"targets": ["layers.*.attention.*", "*.shared.*", "*.experts.*"]}
CASES = [
    case("lora", 48, "h100x8", "tensor=8", 1, 433152),
    case("lora", 48, "h100x8x8", "sequence=8,tensor=8", 1, 3355648),
    case("lora", 4, "h100x1", "data=1", 1, 8192, weights="int4"),
    case("lora", 4, "h100x8", "expert=8", 8, 8192),
    case("lora", 4, "h100x8", "expert=8", 8, 8192, accumulate=2),
    case("lora", 4, "h100x8", "expert=8", 8, 8192, adapter=EVERYWHERE),
    case("lora", 4, "h100x8", "fsdp=8", 8, 8192),
    case("lora", 4, "h100x8", "fsdp=8", 8, 8192, adapter=EVERYWHERE),
    case("lora", 4, "h100x8", "fsdp=8", 8, 8192, remat="attention"),
    case("lora", 4, "h100x8", "fsdp=8", 8, 8192, remat="dots"),
    case("lora", 2, "h100x8", "fsdp=8", 8, 32768),
    case("lora", 2, "h100x8", "sequence=8", 1, 262144),
    case("lora", 4, "h100x8", "sequence=2,tensor=4", 1, 65536),
    case("lora", 2, "h100x8", "fsdp=2,tensor=4", 2, 65536),
    case("lora", 4, "h100x8", "fsdp=2,tensor=4", 2, 65536),
    case("lora", 2, "h100x8", "tensor=8", 1, 262144),
    case("lora", 4, "h100x8x8", "sequence=8,tensor=8", 1, 1048576),
    case("lora", 4, "v5p-16", "fsdp=8", 8, 8192),
    case("train", 4, "h100x8", "fsdp=8", 8, 8192),
    case("train", 4, "h100x8", "fsdp=8", 8, 8192, accumulate=2),
    case("train", 4, "h100x8", "fsdp=8", 8, 8192, optimizer={"name": "muon"}),
    case("train", 4, "h100x8", "expert=8", 8, 8192),
    case(
        "train",
        4,
        "h200x8",
        "expert=8",
        8,
        8192,
        params_dtype="bfloat16",
        optimizer={"name": "adafactor"},
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, nargs="*", help="of the cases to compile")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    kept = {_key(x["case"]): x["compiled"] for x in json.loads(FIGURES.read_text())}
    for number in args.number:
        kept[_key(CASES[number])] = compiled(CASES[number])
    found = [(x, kept[_key(x)]) for x in CASES if _key(x) in kept]
    figures = [
        {"case": x, "formula": formula(x), "compiled": by_compiler} for x, by_compiler in found
    ]
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


def _key(case: dict) -> str:
    return json.dumps(case, sort_keys=True)


def formula(case: dict) -> dict[str, int]:
    """Bytes of a device by use, by the plan's formula."""
    return dataclasses.asdict(memory(*_step(case), target_of(case)))


def compiled(case: dict) -> dict[str, Any]:
    """Bytes of a device by use, by the target's compiler."""
    from jaxmoe.plan.compiled import compile_step  # imports the compilers

    found = compile_step(*_step(case), target_of(case))
    uses = {name: getattr(found, name) for name in ("weights", "optimizer", "temporaries")}
    return {**uses, "peak": found.peak, "jax": jax.__version__, "date": f"{datetime.date.today()}"}


def _step(case: dict) -> tuple[Work, MeshConfig]:
    changes = dict(case)
    task, layers, mesh = (changes.pop(name) for name in ("task", "layers", "mesh"))
    rows, context, _ = (changes.pop(name) for name in ("rows", "context", "target"))
    weights = changes.pop("weights", "bf16")
    config = dataclasses.replace(PRESETS["scout"], layers=PRESETS["scout"].layers[:layers])
    run = _changed(default_run(task), changes)
    work = Work(config=config, task=task, context=context, rows=rows, weights=weights, run=run)
    return work, MeshConfig.parse(mesh)


def _changed(config: Any, changes: dict) -> Any:
    """A config with other values of fields, where a dict changes fields of a field."""
    inner = {k: _changed(getattr(config, k), v) for k, v in changes.items() if isinstance(v, dict)}
    lists = {k: tuple(v) for k, v in changes.items() if isinstance(v, list)}
    return dataclasses.replace(config, **{**changes, **lists, **inner})


def target_of(case: dict) -> Target:
    """The hardware of a case."""
    return parse_target(case["target"])


if __name__ == "__main__":
    main()
