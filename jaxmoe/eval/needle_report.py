"""Reports the results of the needle test: a summary, a table for the terminal, a heat map."""

import io
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxmoe.errors import UserError
from jaxmoe.files.outputs import write_file

Record = dict[str, Any]
CELL, LEFT, TOP = (56, 28), 72, 40  # pixels: of a cell, and beside and above the cells
PAGE = 132  # columns
BEGIN, END = "<!-- numbers, by make_needle_model.py report -->\n", "<!-- end of numbers -->\n"
RED, GREEN = (215, 70, 60), (60, 160, 90)


def show(table: Table) -> None:
    """Prints a table; in a file or a pipe it may be wider than a terminal."""
    Console(width=None if sys.stdout.isatty() else PAGE).print(table)


def by_length(records: list[Record]) -> dict[int, dict[tuple[float, float], list[Record]]]:
    """The trials of each length and depth, in the order they were made in."""
    cells: dict[int, dict[tuple[float, float], list[Record]]] = {}
    for record in records:
        row = cells.setdefault(record["length"], {})
        row.setdefault(tuple(record["depth"]), []).append(record)
    return cells


def summary(records: list[Record]) -> list[Record]:
    """For each length: how many were found at each depth and in all; how exact the paths were."""
    return [_line(length, list(row.values())) for length, row in by_length(records).items()]


def _line(length: int, cells: list[list[Record]]) -> Record:
    """The summary of one length, from its trials by depth, shallowest first."""
    records = [record for cell in cells for record in cell]
    return {
        "length": length,
        "found": sum(record["found"] for record in records),
        "trials": len(records),
        "found_by_depth": [sum(record["found"] for record in cell) for cell in cells],
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "host_peak_bytes": max(record["host_peak_bytes"] for record in records),
        **_exactness(records),
    }


def _exactness(records: list[Record]) -> Record:
    checked = [record for record in records if "same_greedy" in record]
    if not checked:
        return {}
    return {
        "checked": len(checked),
        "max_logit_difference": max(record["max_logit_difference"] for record in checked),
        "same_greedy": sum(record["same_greedy"] for record in checked),
    }


def table(records: list[Record]) -> Table:
    """A row for each length: found by depth and in all, and how exact the paths were."""
    lines, cells = summary(records), by_length(records)
    depths = list(dict.fromkeys(depth for row in cells.values() for depth in row))
    result = Table(title="Pass keys found, by length and depth of the needle")
    for name in ("tokens", *map(depth_name, depths), "all", "same greedy", "max |Δ logit|"):
        result.add_column(name, justify="right")
    for line in lines:
        row = cells[line["length"]]
        found = [_count(row[depth]) if depth in row else "" for depth in depths]
        share = f"{line['found'] / line['trials']:.0%}"
        result.add_row(f"{line['length']:,}", *found, share, *_exactness_cells(line))
    return result


def _count(cell: list[Record]) -> str:
    return f"{sum(record['found'] for record in cell)}/{len(cell)}"


def _exactness_cells(line: Record) -> tuple[str, str]:
    if "same_greedy" not in line:
        return "not checked", ""
    same = f"{line['same_greedy']}/{line['checked']}"
    return same, f"{line['max_logit_difference']:.1e}"


def depth_name(depth: tuple[float, float]) -> str:
    """A depth in words, such as 0-10% or 50%."""
    low, high = (f"{round(100 * bound, 1):g}" for bound in depth)
    return f"{low}%" if low == high else f"{low}-{high}%"


def with_numbers(readme: str, metrics: Record) -> str:
    """A README with its table replaced by that of a JSON file of jaxmoe evaluate."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + markdown(metrics["trials"]) + END + rest.split(END)[1]


def markdown(records: list[Record]) -> str:
    """A row for each length; only lengths that were measured, each with its count of trials."""
    rows = [
        "| tokens | found | same greedy tokens | largest logit difference | host memory, peak |"
    ]
    rows.append("|---:|---:|---:|---:|---:|")
    for line in summary(records):
        same, difference = _exactness_cells(line)
        found, peak = f"{line['found']}/{line['trials']}", line["host_peak_bytes"] / 2**20
        rows.append(f"| {line['length']:,} | {found} | {same} | {difference} | {peak:,.0f} MiB |")
    return "\n" + "\n".join(rows) + "\n\n"


def write_png(path: str, records: list[Record]) -> None:
    """A heat map: a row for each length, a column for each depth, from red (none) to green (all).

    Raises:
        UserError: if Pillow is not installed, or the file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise UserError("--png needs Pillow; run: pip install pillow") from None
    cells = by_length(records)
    width, height = CELL
    depths = list(dict.fromkeys(depth for row in cells.values() for depth in row))
    title = "pass keys found, by context (tokens) and depth of the needle"
    wide = max(LEFT + width * len(depths), int(ImageFont.load_default().getlength(title)) + 8)
    size = (wide + 8, TOP + height * len(cells) + 8)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), title, "black")
    for x, depth in enumerate(depths):
        draw.text((LEFT + width * (x + 0.5), TOP - 8), depth_name(depth), "black", anchor="mm")
    for y, (length, row) in enumerate(cells.items()):
        middle = TOP + height * (y + 0.5)
        draw.text((LEFT - 8, middle), f"{length:,}", "black", anchor="rm")
        for x in (x for x, depth in enumerate(depths) if depth in row):
            _draw_cell(draw, LEFT + width * x, TOP + height * y, share(row[depths[x]]))
    content = io.BytesIO()
    image.quantize(64).save(content, format="PNG", optimize=True)
    write_file(path, content.getvalue())


def _draw_cell(draw: Any, left: int, top: int, part: float) -> None:
    width, height = CELL
    draw.rectangle((left, top, left + width - 2, top + height - 2), fill=colour(part))
    draw.text((left + width / 2, top + height / 2), f"{part:.0%}", "white", anchor="mm")


def share(cell: list[Record]) -> float:
    """The fraction of the trials that found their key."""
    return sum(record["found"] for record in cell) / len(cell)


def colour(part: float) -> tuple[int, ...]:
    """A colour between red, for 0, and green, for 1."""
    return tuple(round(r + part * (g - r)) for r, g in zip(RED, GREEN, strict=True))
