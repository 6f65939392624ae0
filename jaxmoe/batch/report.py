"""What came of a job: counts of each part, their sums, and a picture of them."""

import collections
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, TOP, WIDTH, HEIGHT = (960, 540), 60, 90, 400, 360
GAP, INK, COLORS = 70, "#222222", ("#3b6ea5", "#e08a3c")
MOST_BARS = 12


class Answer(NamedTuple):
    """What one answer of a line of output says of itself."""

    finish_reason: str
    tokens: int


def answers_of(line: dict[str, Any]) -> Iterator[Answer]:
    """The answers of a line of output without an error, OpenAI's or ours."""
    if "response" in line:
        body = line["response"]["body"]
        each = body["usage"]["completion_tokens"] // max(1, len(body["choices"]))
        yield from (Answer(choice["finish_reason"], each) for choice in body["choices"])
        return
    for record in line.get("answers", [line]):
        yield Answer(record["finish_reason"], record["usage"]["completion_tokens"])


def _prompt_tokens(line: dict[str, Any]) -> int:
    if "response" in line:
        return line["response"]["body"]["usage"]["prompt_tokens"]
    return sum(one["usage"]["prompt_tokens"] for one in line.get("answers", [line])[:1])


def part_report(
    lines: Iterable[dict[str, Any]], failed: list[int], begun: float, ended: float
) -> dict[str, Any]:
    """The counts of a part.

    Args:
        lines: of its answers.
        failed: the numbers of its rows that have an error.
        begun, ended: when it was taken and when it was whole, in seconds since 1970.
    """
    reasons, lengths = collections.Counter(), collections.Counter()
    rows = prompts = tokens = 0
    for line in lines:
        rows, prompts = rows + 1, prompts + _prompt_tokens(line)
        for answer in answers_of(line):
            reasons[answer.finish_reason] += 1
            lengths[str(1 << answer.tokens.bit_length())] += 1  # below this power of two
            tokens += answer.tokens
    counts = {"answered": rows, "failed": failed, "prompt_tokens": prompts}
    counts |= {"completion_tokens": tokens, "finish_reasons": dict(reasons)}
    return counts | {"lengths_below": dict(lengths), "begun": begun, "ended": ended}


def job_report(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sums of parts' reports; a row that failed again in another round counts again.

    `hours` is the time of all programs together, in which blocks were worked on.
    """
    reasons, lengths = collections.Counter(), collections.Counter()
    total = collections.Counter()
    for part in parts:
        reasons.update(part["finish_reasons"])
        lengths.update(part["lengths_below"])
        names = ("answered", "prompt_tokens", "completion_tokens")
        total.update({name: part[name] for name in names} | {"failed": len(part["failed"])})
        total.update({"hours": (part["ended"] - part["begun"]) / 3600})
    ordered = sorted(lengths.items(), key=lambda item: int(item[0]))
    return dict(total) | {"finish_reasons": dict(reasons), "lengths_below": dict(ordered)}


def encode_report(report: dict[str, Any]) -> bytes:
    """A report as JSON."""
    return json.dumps(report, indent=1).encode() + b"\n"


def draw_report(report: dict[str, Any]) -> bytes:
    """A PNG: how long answers are, and why they ended."""
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    title = (
        f"{report.get('answered', 0):,} rows answered, {report.get('failed', 0):,} failed, "
        f"{report.get('completion_tokens', 0):,} tokens written"
    )
    pen.text((LEFT, 20), title, font=ImageFont.load_default(20), fill=INK)
    lengths = {f"<{most}": count for most, count in report["lengths_below"].items()}
    panels = {"answers by tokens": lengths, "answers by finish reason": report["finish_reasons"]}
    for i, (name, counts) in enumerate(panels.items()):
        _panel(pen, LEFT + i * (WIDTH + GAP), name, counts, COLORS[i])
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _panel(pen: ImageDraw.ImageDraw, left: int, name: str, counts: dict, color: str) -> None:
    font, bottom = ImageFont.load_default(14), TOP + HEIGHT
    pen.text((left, TOP - 30), name, font=ImageFont.load_default(16), fill=INK)
    shown = list(counts.items())[-MOST_BARS:]
    most = max((count for _, count in shown), default=1)
    step = WIDTH / max(1, len(shown))
    for i, (label, count) in enumerate(shown):
        x, top = left + (i + 0.5) * step, bottom - (HEIGHT - 30) * count / most
        pen.rectangle((x - 0.35 * step, top, x + 0.35 * step, bottom), fill=color)
        pen.text((x, top - 4), f"{count:,}", font=font, fill=INK, anchor="mb")
        pen.text((x, bottom + 6), label, font=font, fill=INK, anchor="mt")
    pen.line((left, bottom, left + WIDTH, bottom), fill=INK)
