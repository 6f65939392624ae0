"""`jaxmoe evaluate logits`: the logits of given tokens, by any path."""

import argparse
import contextlib
import os
import zipfile
from collections.abc import Iterator

import jax
import numpy as np

from jaxmoe.cli import devices
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.files import outputs
from jaxmoe.processes import is_first
from jaxmoe.progress import task_progress


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser("logits", help="logits of given tokens")
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument(
        "--tokens",
        required=True,
        metavar="FILE.npz",
        help="int32 `tokens` [batch, length]; if packed or padded also `segment_ids`",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE.npy", help="float32 [batch, length, vocab]"
    )
    parser.add_argument(
        "--decode-from", type=int, metavar="N", help="prefill N tokens, then one at a time"
    )
    parser.add_argument(
        "--prefill-chunk",
        "--prefill-segment",
        type=int,
        metavar="N",
        help="prefill through the cache, N tokens at a time",
    )
    devices.add_flags(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the command."""
    tokens, segment_ids = read_tokens(args.tokens)
    _check_flags(args)
    mesh = devices.start(args)
    outputs.check_writable(args.output, empty=True)
    config, params = devices.load(args, mesh, text_only=True)
    shape = (*tokens.shape, config.vocab_size)
    with output_array(args.output, shape) as out, jax.set_mesh(mesh):
        with task_progress("Logits", tokens.shape[1], "tokens") as advance:
            token_logits(
                config,
                params,
                tokens,
                segment_ids,
                decode_from=args.decode_from,
                prefill_chunk=args.prefill_chunk,
                out=out,
                report=advance,
            )
    print(f"Wrote logits {shape} to {args.output}.")


def read_tokens(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """`tokens` and `segment_ids` of an npz file."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as npz: {error}.") from None
    if "tokens" not in arrays:
        raise UserError(f"{path} holds no array `tokens`.")
    tokens, segment_ids = arrays["tokens"], arrays.get("segment_ids")
    for name, array in (("tokens", tokens), ("segment_ids", segment_ids)):
        if array is None:
            continue
        right_shape = array.ndim == 2 and array.size and array.shape == tokens.shape
        if not right_shape or array.dtype.kind not in "iu":
            raise UserError(
                f"{path}: `{name}` is {array.dtype} {array.shape}, not integers [batch, length], "
                f"both above 0 and the same for all arrays."
            )
        if array.min() < 0 or array.max() >= 2**31:
            raise UserError(f"{path}: `{name}` holds a number below 0 or above 2**31 - 1.")
    return tokens.astype(np.int32), None if segment_ids is None else segment_ids.astype(np.int32)


@contextlib.contextmanager
def output_array(path: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A float32 array that becomes an .npy file once it is whole; until then nothing is there.

    All of its disk is taken first: a full disk would kill the process that writes mapped memory.
    Of several processes the first one writes it, and the others' arrays forget what is written.
    """
    if not is_first():
        nowhere = np.empty(1, np.float32)
        yield np.lib.stride_tricks.as_strided(nowhere, shape, (0,) * len(shape))
        return
    with outputs.writable(path):
        place = outputs.place_of(path)
        with outputs.locked(place) as (file, partial):
            try:
                out = np.lib.format.open_memmap(partial, "w+", np.dtype(np.float32), shape)
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
                yield out
                out.flush()
                outputs.publish(file, partial, place)
            finally:
                partial.unlink(missing_ok=True)


def _check_flags(args: argparse.Namespace) -> None:
    if args.decode_from is not None and args.decode_from < 0:
        raise UserError(f"--decode-from {args.decode_from} is below 0.")
    if args.prefill_chunk is not None and args.prefill_chunk < 1:
        raise UserError(f"--prefill-chunk {args.prefill_chunk} is below 1.")
