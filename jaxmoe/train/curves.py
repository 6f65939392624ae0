"""Draws the losses of a run as a PNG."""

import io
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jaxmoe.files.outputs import write_file

SIZE, (LEFT, TOP, RIGHT, BOTTOM) = (960, 540), (80, 50, 940, 490)
COLORS = {"loss": "#3b6ea5", "held_out_loss": "#e08a3c"}
INK, LINE = "#222222", "#eeeeee"
LINES = 5  # horizontal

Curve = list[tuple[int, float]]  # steps and losses


def draw_losses(metrics: Path, path: Path) -> None:
    """Writes a picture of the training loss and the held-out loss by step, in nats a token.

    Args:
        metrics: a record a line.
        path: the PNG file.

    Raises:
        UserError: if the file cannot be written.
    """
    curves = {name: _curve(metrics, name) for name in COLORS}
    points = [point for curve in curves.values() for point in curve]
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    if points:
        steps, losses = zip(*points, strict=True)
        _draw(pen, curves, max(steps), (min(losses), max(losses)))
    content = io.BytesIO()
    image.save(content, "PNG")
    write_file(path, content.getvalue())


def _curve(metrics: Path, name: str) -> Curve:
    """The points of a loss, those that are numbers, read line by line."""
    curve = []
    with open(metrics) as lines:
        for line in lines:
            record = json.loads(line)
            loss = record.get(name)
            if isinstance(loss, int | float) and math.isfinite(loss):
                curve.append((record["step"], float(loss)))
    return curve


def _draw(
    pen: ImageDraw.ImageDraw, curves: dict[str, Curve], last: int, span: tuple[float, float]
) -> None:
    least, most = span
    height = (BOTTOM - TOP) / ((most - least) or 1.0)
    font = ImageFont.load_default(14)
    for i in range(LINES):
        loss = least + (most - least) * i / (LINES - 1)
        y = BOTTOM - (loss - least) * height
        pen.line((LEFT, y, RIGHT, y), fill=LINE)
        pen.text((LEFT - 8, y), f"{loss:.3g}", font=font, fill=INK, anchor="rm")
    pen.text((RIGHT, BOTTOM + 8), f"step {last}", font=font, fill=INK, anchor="ra")
    for i, (name, curve) in enumerate(curves.items()):
        pen.text((LEFT + 160 * i, 20), name, font=font, fill=COLORS[name])
        places = [
            (LEFT + (RIGHT - LEFT) * step / last, BOTTOM - (loss - least) * height)
            for step, loss in curve
        ]
        if len(places) > 1:
            pen.line(places, fill=COLORS[name], width=2)
        for x, y in places if len(places) < 50 else ():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=COLORS[name])
