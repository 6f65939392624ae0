"""The flags of commands that answer files of requests, and what is made of them."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.heads import check_head, load_head
from jaxmoe.checkpoint.peft import adapter_digest, read_adapter, read_adapters
from jaxmoe.checkpoint.zarr.manifest import digest_of
from jaxmoe.cli import devices, image_flags, sampling_flags
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.checking import Checker
from jaxmoe.generation.engine import STEP_TOKENS
from jaxmoe.generation.request import stop_ids_of
from jaxmoe.generation.request_keys import check_count
from jaxmoe.generation.sampling import Sampling
from jaxmoe.images import ImageSettings
from jaxmoe.model.kv_cache import KV_FORMATS
from jaxmoe.text import Tokenizer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `check` and `read_setting` read, with those of devices."""
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="parse special tokens such as <|eot|> in prompts; in messages they are never parsed",
    )
    parser.add_argument(
        "--n", type=int, default=1, metavar="N", help="answers to each prompt; lines may change it"
    )
    sampling_flags.add_flags(parser)
    parser.add_argument(
        "--rows",
        type=int,
        default=8,
        metavar="N",
        help="the most requests in a batch; in bfloat16 it may change answers by rounding",
    )
    parser.add_argument("--kv", choices=KV_FORMATS, help="how the cache stores keys and values")
    parser.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="capacity for all rows; requests wait for room",
    )
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=STEP_TOKENS,
        metavar="N",
        help="the most tokens of prompts and answers that one step takes; default: %(default)s",
    )
    parser.add_argument(
        "--drafts",
        type=int,
        metavar="N",
        help="tokens that a row tries at once, at most, where its text repeats itself; in bfloat16 "
        "it may change answers by rounding. 0: none; default: on CPUs 7, as far as --rows leaves "
        "room, else none. Given, it also makes larger steps, which are compiled on the way",
    )
    parser.add_argument(
        "--head",
        metavar="FOLDER",
        help="an EAGLE-3 head that jaxmoe convert wrote with --target: it guesses 3 tokens, or "
        "--drafts, in place of the row's own text",
    )
    devices.add_flags(parser, named_adapters=True)


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for a number that no value of its flag can be."""
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} is below 1.")
    check_count("--n", args.n)
    check_count("--step-tokens", args.step_tokens)
    if args.drafts is not None and args.drafts < 0:
        raise UserError(f"--drafts {args.drafts} is below 0.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the answers of a command depend on, beside its requests.

    Attributes:
        adapters: the digest of each named adapter; None where it is not known.
        images: how pictures become tokens; None if the model has no vision tower.
    """

    model: Llama4Config
    tokenizer: Tokenizer | None
    sampling: Sampling
    stop_ids: tuple[int, ...]
    adapters: dict[str, str | None]
    images: ImageSettings | None

    def checker(self, cache_tokens: int | None, **document: Any) -> Checker:
        """Checks requests against the model, and the length and adapter of a document."""
        given = self.model, self.tokenizer, self.sampling
        return Checker(*given, cache_tokens=cache_tokens, adapters=self.adapters, **document)

    def options(self, args: argparse.Namespace, params: dict) -> dict[str, Any]:
        """The arguments of `generate` and `generate_from` that flags and checkpoint give.

        Args:
            params: the model's, on the current mesh.
        """
        head, mesh = None, jax.sharding.get_mesh()
        if args.head is not None:
            head = load_head(args.head, mesh, self.model, params["embed"].dtype)
        names = ("rows", "kv", "step_tokens", "cache_tokens", "drafts")
        given = {name: getattr(args, name) for name in names}
        return given | {"stop_ids": self.stop_ids, "tokenizer": self.tokenizer, "head": head}

    def described(self, args: argparse.Namespace, document: str | None = None) -> list[Any]:
        """What `job_digest` hashes of it: models by their digests, and settings."""
        folders = filter(None, (args.checkpoint, document))
        models = [digest_of(Path(folder)) for folder in folders]
        plain = devices.adapters_by(args)["adapter"]
        models += [adapter_digest(plain)] if plain else []
        of_tokenizer = self.tokenizer and self.tokenizer.digest
        settings = [vars(self.sampling), self.stop_ids, args.kv, args.dtype, of_tokenizer]
        return [*settings, [*models, *map(list, self.adapters.items())]]


def read_setting(args: argparse.Namespace, sampling: Sampling) -> Setting:
    """The setting that the flags and the checkpoint say.

    Raises:
        UserError: if the checkpoint, an adapter or a head cannot be used.
    """
    tokenizer = devices.tokenizer(args.checkpoint)
    model = store.read_config(args.checkpoint)
    if args.head is not None:
        check_head(args.head, model)
    adapters, images = _adapters(args, model), image_flags.settings_by(args, model)
    stop_ids = stop_ids_of(model, tokenizer)
    return Setting(model, tokenizer, sampling, stop_ids, adapters, images)


def _adapters(args: argparse.Namespace, model: Llama4Config) -> dict[str, str | None]:
    """The digest of each named adapter; raises for an unusable one before anything else."""
    given = devices.adapters_by(args)
    if given["adapter"]:
        read_adapter(given["adapter"], model)
    read_adapters(given["adapters"], model)
    return {name: adapter_digest(folder) for name, folder in given["adapters"].items()}
