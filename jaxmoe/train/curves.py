"""Draws the losses of a run as a PNG."""

import io
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jaxmoe.files.outputs import write_file

SIZE, (LEFT, TOP, RIGHT, BOTTOM) = (960, 540), (80, 50, 940, 490)
COLORS = {"loss": "#3b6ea5", "held_out_loss": "#e08a3c"}
# Of sources, again from the first on where there are more.
OTHERS = ("#5aa469", "#a05195", "#d45087", "#8a6d3b", "#2f9e9e", "#7a7a7a", "#b5a300", "#665191")
NAMED, LETTERS = 5, 23  # losses in a line of the legend, and letters of a name
INK, LINE = "#222222", "#eeeeee"
LINES = 5  # horizontal

Curve = list[tuple[int, float]]  # steps and losses


def draw_losses(metrics: Path, path: Path) -> None:
    """Writes a picture of the training loss and the held-out loss by step, in nats a token.

    Beside them in thinner lines those of each source, if there are several.

    Args:
        metrics: a record a line.
        path: the PNG file.

    Raises:
        UserError: if the file cannot be written.
    """
    curves = _curves(metrics)
    points = [point for curve in curves.values() for point in curve]
    legend = 20 * ((len(curves) - 1) // NAMED)  # lines below the first
    image = Image.new("RGB", (SIZE[0], SIZE[1] + legend), "white")
    pen = ImageDraw.Draw(image)
    if points:
        steps, losses = zip(*points, strict=True)
        _draw(pen, curves, max(steps), (min(losses), max(losses)), legend)
    content = io.BytesIO()
    image.save(content, "PNG")
    write_file(path, content.getvalue())


def _curves(metrics: Path) -> dict[str, Curve]:
    """The points of each loss, those that are numbers, read line by line."""
    curves: dict[str, Curve] = {name: [] for name in COLORS}
    with open(metrics) as lines:
        for line in lines:
            record = json.loads(line)
            for name, loss in record.items():
                is_number = isinstance(loss, int | float) and math.isfinite(loss)
                if name.partition("/")[0] in COLORS and is_number:
                    curves.setdefault(name, []).append((record["step"], float(loss)))
    return curves


def _short(name: str) -> str:
    """The name of a loss, of a source with a long one its end."""
    kind, _, source = name.partition("/")
    room = LETTERS - len(kind) - 1
    return name if len(source) <= room else f"{kind}/…{source[1 - room :]}"


def _draw(
    pen: ImageDraw.ImageDraw,
    curves: dict[str, Curve],
    last: int,
    span: tuple[float, float],
    legend: int,
) -> None:
    least, most = span
    bottom = BOTTOM + legend
    height = (BOTTOM - TOP) / ((most - least) or 1.0)
    font = ImageFont.load_default(14)
    for i in range(LINES):
        loss = least + (most - least) * i / (LINES - 1)
        y = bottom - (loss - least) * height
        pen.line((LEFT, y, RIGHT, y), fill=LINE)
        pen.text((LEFT - 8, y), f"{loss:.3g}", font=font, fill=INK, anchor="rm")
    pen.text((RIGHT, bottom + 8), f"step {last}", font=font, fill=INK, anchor="ra")
    for i, (name, curve) in enumerate(curves.items()):
        color = COLORS.get(name) or OTHERS[(i - len(COLORS)) % len(OTHERS)]
        row, column = divmod(i, NAMED)
        pen.text((LEFT + 172 * column, 20 + 20 * row), _short(name), font=font, fill=color)
        places = [
            (LEFT + (RIGHT - LEFT) * step / last, bottom - (loss - least) * height)
            for step, loss in curve
        ]
        if len(places) > 1:
            pen.line(places, fill=color, width=2 if name in COLORS else 1)
        for x, y in places if len(places) < 50 else ():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
