"""Plans a model on hardware before it is rented: memory, largest context and bounds on speed."""

import argparse
import dataclasses
import json
import sys

import jax

from jaxmoe.config import PRESETS, VisionConfig
from jaxmoe.errors import UserError
from jaxmoe.generation.drafts import most_drafts
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan import planner
from jaxmoe.plan.drafts import drafted_steps, to_json
from jaxmoe.plan.models import read_dtype, read_head, read_model
from jaxmoe.plan.targets import Target, parse_target
from jaxmoe.plan.text import print_plan
from jaxmoe.plan.work import PREFILL_CHUNK, STORAGE_FORMATS, TASKS, Work
from jaxmoe.train.config import TrainConfig, read_train_config


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="scout, maverick, or a checkpoint's folder")
    parser.add_argument(
        "--target",
        required=True,
        help="such as h100x8, h100x8x2 (two hosts), v5p-16 or v6e-64, or a YAML file of one",
    )
    parser.add_argument("--task", choices=TASKS, help="default: decode, or that of --run")
    parser.add_argument(
        "--run",
        metavar="RUN.yaml",
        help="plan a step of this run of jaxmoe train; default: AdamW in bfloat16 with remat: "
        "full, of lora adapters of rank 16 beside the matrices of attention and shared experts",
    )
    parser.add_argument(
        "--context",
        metavar="N|max",
        help="tokens a row; default: the length of --run, in other training 8192, else max",
    )
    parser.add_argument(
        "--batch", type=int, metavar="B", help="rows; default: those of --run, else 1"
    )
    parser.add_argument("--weights", choices=STORAGE_FORMATS, default="bf16")
    parser.add_argument("--kv", choices=STORAGE_FORMATS, default="bf16")
    parser.add_argument(
        "--prefill-chunk",
        "--segment",  # the flag's old name
        type=int,
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens of each row that one step of prefill processes; default: %(default)s",
    )
    parser.add_argument(
        "--tiles",
        type=int,
        metavar="N",
        help="tiles of images that a step of prefill or training sees, 1 to 17 for each image; a "
        "preset has its vision tower if this is given",
    )
    _add_drafts(parser)
    parser.add_argument(
        "--mesh",
        metavar="SPEC|auto",
        help="as in expert=4,tensor=2, or a YAML file; default: that of --run, else auto",
    )
    parser.add_argument(
        "--compile", action="store_true", help="ask the target's real compiler, in minutes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--png", metavar="FILE", help="draw memory by context")
    return parser


def _add_drafts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drafts",
        type=int,
        metavar="N",
        help="also how long steps of decoding take that try 1 to N drafts of each row",
    )
    parser.add_argument(
        "--head",
        metavar="FOLDER",
        help="a head that drafts, converted or as it is published: its memory, and with --drafts "
        "what its guesses take",
    )
    parser.add_argument(
        "--accepted",
        type=shares,
        default=(),
        metavar="P,P,...",
        help="how likely the first, second, ... draft is right after right ones, 0 to 1; then "
        "--drafts says how many times as fast tokens come",
    )


def main() -> None:
    """Runs the command."""
    jax.config.update("jax_platforms", "cpu")  # plans need no accelerator
    args = make_parser().parse_args()
    target = parse_target(args.target)
    run = None if args.run is None else read_train_config(args.run)
    if run is not None:
        _take_defaults(args, run)
    args.task = args.task or "decode"
    mesh = None if args.mesh in (None, "auto") else MeshConfig.parse(args.mesh)
    plan = planner.make_plan(args.model, _work(args, target, mesh, run), target, mesh)
    if args.accepted and args.drafts is None:
        raise UserError("--accepted says how good --drafts are; give both.")
    drafted = drafted_steps(plan, args.drafts, args.accepted) if args.drafts is not None else []
    if not plan.work.trains and read_dtype(args.model) == "float32":
        print(
            f"note: {args.model} is in float32, as it is loaded without --dtype bfloat16, which is "
            "what is planned.",
            file=sys.stderr,
        )
    if args.compile and plan.fits:
        plan = planner.with_compiler(plan)
    if args.json:  # printed even if the plan does not fit, since programs can use its figures
        print(json.dumps(planner.to_json(plan) | {"drafts": to_json(drafted)}, indent=2))
    planner.check_fits(plan)
    if not args.json:
        print_plan(plan, drafted)
    if args.png:
        _draw(plan, args.png)


def shares(text: str) -> tuple[float, ...]:
    """The numbers of `0.7,0.6`; a ValueError for others."""
    return tuple(map(float, text.split(",")))


def _draw(plan: planner.Plan, path: str) -> None:
    try:
        from jaxmoe.plan.png import draw
    except ImportError:  # Pillow is no dependency, since only --png needs it
        raise UserError("--png needs Pillow; run pip install pillow.") from None
    draw(plan, path)


def _take_defaults(args: argparse.Namespace, run: TrainConfig) -> None:
    """Puts what a run says in place of flags that are not given."""
    args.task = args.task or ("train" if run.adapter is None else "lora")
    args.mesh = args.mesh or run.mesh
    if run.data is not None:
        args.context = args.context or str(run.data.length)
        args.batch = run.data.batch_size if args.batch is None else args.batch


def _work(
    args: argparse.Namespace, target: Target, mesh: MeshConfig | None, run: TrainConfig | None
) -> Work:
    config = read_model(args.model)
    if args.model in PRESETS and args.tiles is not None:
        config = dataclasses.replace(config, vision=VisionConfig())
    context = args.context or (str(PREFILL_CHUNK) if args.task in ("train", "lora") else "max")
    if context != "max" and not context.isdecimal():
        raise UserError(f"--context {context} is neither a number of tokens nor 'max'.")
    head = None
    if args.head is not None:
        if most_drafts(config, target.platform) == 0:
            raise UserError(f"this model has no drafts on {target.name}; leave out --head.")
        head = read_head(args.head, config)
    work = Work(
        config=config,
        task=args.task,
        context=config.max_position_embeddings if context == "max" else int(context),
        rows=1 if args.batch is None else args.batch,
        weights=args.weights,
        kv=args.kv,
        prefill_chunk=args.prefill_chunk,
        tiles=args.tiles or 0,
        head=head,
        run=run,
    )
    return planner.with_longest_context(work, target, mesh) if context == "max" else work
