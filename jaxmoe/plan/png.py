"""Draws a plan: a device's memory, by use and context length, as a PNG of stacked bars."""

import dataclasses
import io
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from jaxmoe.files.outputs import write_file
from jaxmoe.plan.memory import Memory, memory
from jaxmoe.plan.planner import GIB, Plan

SIZE, BARS = (960, 540), 8
LEFT, TOP, RIGHT, BOTTOM = 80, 70, 940, 470
COLORS = {
    "weights": "#3b6ea5",
    "cache": "#e08a3c",
    "features": "#4fb3a5",
    "head": "#d98cb3",
    "optimizer": "#8a6bbe",
    "gradients": "#5b8f4e",
    "activations": "#c9a227",
    "temporaries": "#c0504d",
    "free": "#dfe6dc",
}
INK, OVER = "#222222", "#b00020"


class Bar(NamedTuple):
    """A device's memory at one context length."""

    context: int
    memory: Memory


def bars(plan: Plan) -> list[Bar]:
    """The memory at contexts that double up to the model's maximum, and at the plan's own."""
    most = plan.work.config.max_position_embeddings
    contexts = sorted({max(1, most >> i) for i in range(BARS)} | {plan.work.context})
    mesh = plan.chosen.mesh
    works = [dataclasses.replace(plan.work, context=context) for context in contexts]
    return [Bar(work.context, memory(work, mesh, plan.target)) for work in works]


def draw(plan: Plan, path: str) -> None:
    """Writes the PNG file; a line shows the limit, and bars beyond it are labeled in red.

    Raises:
        UserError: if the file cannot be written.
    """
    image = Image.new("RGB", SIZE, "white")
    pen, drawn = ImageDraw.Draw(image), bars(plan)
    top = 1.05 * max(plan.target.memory, *(bar.memory.peak for bar in drawn))
    _title(pen, plan)
    _scale(pen, top)
    step = (RIGHT - LEFT) / len(drawn)
    for i, bar in enumerate(drawn):
        _bar(pen, plan, bar, LEFT + (i + 0.5) * step, 0.3 * step, top)
    y = _height(plan.target.limit, top)
    pen.line((LEFT, y, RIGHT, y), fill=OVER, width=2)
    pen.text((RIGHT, y - 4), "limit", font=_font(14), fill=OVER, anchor="rb")
    content = io.BytesIO()
    image.save(content, "PNG")
    write_file(path, content.getvalue())


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _height(nbytes: int | float, top: int | float) -> float:
    return BOTTOM - (BOTTOM - TOP) * nbytes / top


def _title(pen: ImageDraw.ImageDraw, plan: Plan) -> None:
    work = plan.work
    title = (
        f"{plan.model} on {plan.target.name}, {plan.chosen.mesh}: {work.task}, {work.rows} row(s), "
        f"{work.weights} weights, {work.kv} cache; GiB a device by context"
    )
    pen.text((LEFT, 14), title, font=_font(15), fill=INK)
    x = LEFT
    for name, color in COLORS.items():
        if not getattr(plan.chosen.memory, name, True):
            continue
        pen.rectangle((x, 42, x + 14, 56), fill=color)
        pen.text((x + 20, 41), name, font=_font(14), fill=INK)
        x += 120


def _scale(pen: ImageDraw.ImageDraw, top: int | float) -> None:
    """Draws horizontal lines at round numbers of GiB, up to `top` bytes."""
    step = next(s for s in (10, 20, 50, 100, 200, 500, 1000, 10**6) if top / GIB / s <= 10)
    for gib in range(0, int(top / GIB) + 1, step):
        y = _height(gib * GIB, top)
        pen.line((LEFT, y, RIGHT, y), fill="#eeeeee")
        pen.text((LEFT - 8, y), str(gib), font=_font(14), fill=INK, anchor="rm")


def _bar(
    pen: ImageDraw.ImageDraw, plan: Plan, bar: Bar, x: float, half: float, top: int | float
) -> None:
    parts, low = dataclasses.asdict(bar.memory), 0
    parts["free"] = max(0, plan.target.limit - bar.memory.peak)
    for name, color in COLORS.items():
        high = low + parts[name]
        if high > low:
            pen.rectangle((x - half, _height(high, top), x + half, _height(low, top)), fill=color)
        low = high
    ink = OVER if bar.memory.peak > plan.target.limit else INK
    pen.text((x, BOTTOM + 8), _tokens(bar.context), font=_font(14), fill=ink, anchor="ma")
    pen.text(
        (x, BOTTOM + 28), f"{bar.memory.peak / GIB:.1f}", font=_font(14), fill=ink, anchor="ma"
    )


def _tokens(count: int) -> str:
    """A token count in short: 10M, 1.31M or 65.5K."""
    for unit, name in ((10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
