"""The flags that choose devices, mesh and dtype, and the loading of a checkpoint by them."""

import argparse
import os
import sys
from typing import Any

import jax
from rich.console import Console

from jaxmoe import compilation
from jaxmoe.checkpoint import store
from jaxmoe.cli import watchdog
from jaxmoe.cli.launch import find_launch, join
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.eval.self_test import self_test
from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.layout import layout_table
from jaxmoe.progress import byte_progress
from jaxmoe.text import Tokenizer

MOST_CPU_DEVICES = 1024  # a mistyped 100,000 would take minutes to start


def add_flags(parser: argparse.ArgumentParser, *, named_adapters: bool = False) -> None:
    """Adds the flags that `start` and `load` read.

    Args:
        named_adapters: whether --adapter may be several adapters, which requests choose by name.
    """
    parser.add_argument(
        "--mesh",
        metavar="SPEC",
        help="axes and sizes, as in expert=4,sequence=2, or a YAML file; default: data=-1",
    )
    parser.add_argument(
        "--cpu-devices", type=int, metavar="N", help="simulate N devices on the CPU"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute in this; default: as stored"
    )
    if named_adapters:
        parser.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="[NAME=]FOLDER",
            help="run with an adapter that PEFT or jaxmoe train saved; with NAME, any number, for "
            'lines with the key "adapter"',
        )
    else:
        parser.add_argument(
            "--adapter", metavar="FOLDER", help="run with an adapter of PEFT or jaxmoe train"
        )
    default = str(compilation.default_folder()).replace("%", "%%")
    parser.add_argument(
        "--compilation-cache",
        metavar="FOLDER|off",
        help=f"keeps compiled programs for later runs; default: {default}",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="after loading, check a sentence's entropy and loss, which a bad conversion fails",
    )


def start(args: argparse.Namespace) -> jax.sharding.Mesh:
    """Configures JAX by the flags of `add_flags`, and returns the mesh.

    Where this process is one of several (`jaxmoe.cli.launch`), waits for the others, whose devices
    the mesh has, too.
    """
    if args.cpu_devices is not None:
        if not 1 <= args.cpu_devices <= MOST_CPU_DEVICES:
            given = f"--cpu-devices {args.cpu_devices}"
            raise UserError(f"{given} is not between 1 and {MOST_CPU_DEVICES}.")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    _prepare_compiling(getattr(args, "compilation_cache", None))
    launch = find_launch()
    if launch is not None:
        join(launch)
    found = devices()
    watchdog.start()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():  # as on TPU hosts
        raise UserError(
            f"JAX finds {jax.process_count()} processes that nothing has joined; set "
            "JAXMOE_CLUSTER=auto on all hosts."
        )
    return MeshConfig.parse(args.mesh or "data=-1").make(found)


def devices() -> list[jax.Device]:
    """JAX's devices.

    Raises:
        UserError: if JAX was told to use a platform that this machine does not have.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts if a platform's name is unknown
        reason = str(error).partition("\n")[0] or "there is none"
        wanted = jax.config.jax_platforms
        raise UserError(
            f"JAX_PLATFORMS={wanted} cannot be used ({reason.rstrip('.')}); unset it, or set it to "
            "cpu."
        ) from None


def _prepare_compiling(cache: str | None) -> None:
    folder = None if cache == "off" else compilation.keep_compiled(cache)
    kept = f"; kept in {folder} for later runs" if folder else ""
    if sys.stderr.isatty():
        compilation.on_long_compilation(lambda: print(f"[compiling{kept}]", file=sys.stderr))


def load(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, text_only: bool = False
) -> tuple[Llama4Config, dict]:
    """Loads the checkpoint's configuration, and its parameters sharded over the mesh.

    With --mesh it first prints how parameters are sharded, and with --self-test it checks them.
    """
    dtype = args.dtype or _one_dtype(args.checkpoint, text_only)
    if args.mesh:
        config, params = store.abstract(args.checkpoint, mesh, dtype, text_only)
        Console(stderr=True).print(layout_table(config, params, mesh))
    with byte_progress("Loading") as progress:
        config, params = store.load(
            args.checkpoint, mesh, dtype, progress, text_only=text_only, **adapters_by(args)
        )
    if args.self_test:
        with jax.set_mesh(mesh):
            result = self_test(config, params, tokenizer(args.checkpoint))
        known = "" if result.surprise is None else f", surprise {result.surprise:.2f}"
        print(f"[self-test: entropy {result.entropy:.2f}{known} of guessing]", file=sys.stderr)
    return config, params


def adapters_by(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments `adapter` and `adapters` of `store.load` that --adapter gives.

    A value that is a folder has no name, even with a "=" in it.

    Raises:
        UserError: for several adapters without names, or two of one name.
    """
    if not isinstance(args.adapter, list):
        return {"adapter": args.adapter}
    named: dict[str, str] = {}
    plain: list[str] = []
    for value in args.adapter:
        name, equals, folder = value.partition("=")
        if not equals or "/" in name or os.path.isdir(value):
            plain.append(value)
        elif name in named:
            raise UserError(f"--adapter gives two folders the name {name!r:.80}; use another.")
        else:
            named[name] = folder
    if len(plain) > 1 or (plain and named):
        raise UserError(
            f"--adapter {plain[0]} has no name, and there are others; give each as NAME=FOLDER."
        )
    return {"adapter": plain[0] if plain else None, "adapters": named}


def _one_dtype(checkpoint: str, text_only: bool) -> str:
    """The dtype to load all parameters in: the checkpoint's main one if it mixes several."""
    dtype, *others = store.main_dtypes(checkpoint, text_only)
    if others:
        stored = " and ".join([dtype, *others])
        print(f"[stored in {stored}; loaded in {dtype}, or as --dtype says]", file=sys.stderr)
    return dtype


def tokenizer(checkpoint: str) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None if it has none."""
    if not os.path.isdir(checkpoint):
        raise UserError(f"{checkpoint} is no folder; give one that jaxmoe convert wrote.")
    return Tokenizer.load_if_any(checkpoint)


def required_tokenizer(checkpoint: str) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        UserError: if it has none.
    """
    found = tokenizer(checkpoint)
    if found is None:
        raise UserError(f"{checkpoint} has no tokenizer; copy the model's one there.")
    return found
