"""The flags that say how pictures become tiles and tokens."""

import argparse
import dataclasses

from jaxmoe.config import Llama4Config
from jaxmoe.generation.request_keys import check_count
from jaxmoe.images import ImageSettings, PictureReader, read_image_settings
from jaxmoe.images.settings import MOST_TILES
from jaxmoe.images.tokens import IMAGE
from jaxmoe.text import Prompt, Tokenizer, render_chat, text_prompt


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds all flags."""
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="a picture before --prompt; may be given again. With --parse-special, each <|image|> "
        "of the prompt is the place of one",
    )
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how pictures become tiles, wherever they come from."""
    parser.add_argument(
        "--max-tiles",
        type=int,
        metavar="N",
        help="the most tiles of a picture; fewer take fewer tokens. Default: the checkpoint's, 16",
    )
    parser.add_argument(
        "--no-exif", action="store_true", help="do not turn pictures as their EXIF data say"
    )
    parser.add_argument(
        "--allow-network", action="store_true", help="fetch pictures with http and https URLs"
    )


def settings_by(args: argparse.Namespace, config: Llama4Config) -> ImageSettings | None:
    """The settings of a checkpoint with those of the flags; None if it has no vision tower."""
    if args.max_tiles is not None:
        check_count("--max-tiles", args.max_tiles, MOST_TILES)
    if config.vision is None:
        return None
    settings = read_image_settings(args.checkpoint, config.vision)
    flags = {"exif": not args.no_exif, "allow_network": args.allow_network}
    flags |= {"max_tiles": args.max_tiles} if args.max_tiles is not None else {}
    return dataclasses.replace(settings, **flags)


def prompt_by(
    args: argparse.Namespace, tokenizer: Tokenizer, settings: ImageSettings | None
) -> Prompt:
    """The --prompt with its pictures before it, or at the places that it marks."""
    reader = PictureReader(settings) if settings is not None else None
    if args.chat:
        pictures = [{"type": "image", "path": file} for file in args.image]
        text = [{"type": "text", "text": args.prompt}]
        content = [*pictures, *text] if pictures else args.prompt
        return render_chat([{"role": "user", "content": content}], tokenizer, reader)
    marks = args.image and args.parse_special and IMAGE in args.prompt
    texts = args.prompt.split(IMAGE) if marks else [*[""] * len(args.image), args.prompt]
    return text_prompt(texts, tokenizer, reader, args.image, args.parse_special)
