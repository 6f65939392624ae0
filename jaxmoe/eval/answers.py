"""Grades answers to questions whose right answers are known."""

from typing import Any

from rich.table import Table

Record = dict[str, Any]


def grade(expected: str, text: str) -> Record:
    """How right an answer is, as plain numbers.

    Returns:
        `right`: whether it is the expected one but for white space around it. `characters`: how
        many the expected one has, white space apart; `characters_right`: of how many of them the
        answer has the same at the same place.
    """
    wanted, got = ("".join(x.split()) for x in (expected, text))
    return {
        "right": text.strip() == expected.strip(),
        "characters": len(wanted),
        "characters_right": sum(a == b for a, b in zip(wanted, got, strict=False)),
    }


def summary(records: list[Record]) -> list[Record]:
    """A record for each group of graded answers, in the order of the first of each, and for all."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    if len(groups) != 1:
        groups["all"] = records
    return [{"group": name} | _counts(group) for name, group in groups.items()]


def _counts(records: list[Record]) -> Record:
    names = ("right", "characters", "characters_right")
    return {"questions": len(records)} | {name: sum(x[name] for x in records) for name in names}


def table(records: list[Record]) -> Table:
    """The table that is printed, a row for each group."""
    shown = Table(title="Answers that are right, whole and by character")
    shown.add_column("questions")
    for name in ("asked", "right", "share", "characters right"):
        shown.add_column(name, justify="right")
    for line in summary(records):
        asked, right = line["questions"], line["right"]
        by_character = _share(line["characters_right"], line["characters"])
        shown.add_row(line["group"], str(asked), str(right), _share(right, asked), by_character)
    return shown


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
