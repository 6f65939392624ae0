"""docs/training.md: its YAML is read, and its table is what the dataclasses say."""

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path

from jaxmoe.train.config import TrainConfig, read_train_config

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def accepted(kind):
    """A field's type in words."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        return f"a list of {accepted(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is typing.Annotated:
        kind, bounds = typing.get_args(kind)
        return {int: "a whole number ", float: "a number "}[kind] + str(bounds)
    if typing.get_origin(kind) is typing.Literal:
        values = typing.get_args(kind)
        return ", ".join(f"`{str(v).lower() if v in (True, False) else v}`" for v in values)
    return {bool: "`true`, `false`", str: "text", dict: "a mapping"}[kind]


def default(field):
    if field.default not in (dataclasses.MISSING, None, ()):
        value = str(field.default)
        return f"`{value.lower() if isinstance(field.default, bool) else value}`"
    return "" if field.default is field.default_factory is dataclasses.MISSING else "none"


def rows(cls, prefix=""):
    """The lines of the table: every field with what its class's docstring says of it."""
    listed = inspect.getdoc(cls).split("Attributes:\n")[1]
    said = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed, re.MULTILINE))
    kinds = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        part = next(iter(typing.get_args(kinds[field.name])), kinds[field.name])
        if dataclasses.is_dataclass(part):
            of_list = "[]" if typing.get_origin(kinds[field.name]) is tuple else ""
            yield from rows(part, f"{prefix}{field.name}{of_list}.")
        else:
            words = " ".join(said[field.name].split())
            cells = (f"`{prefix}{field.name}`", default(field), accepted(kinds[field.name]), words)
            yield "| " + " | ".join(cells) + " |"


def test_every_field_is_in_the_table():
    table = PAGE.partition("## Every field")[2].partition("|---|---|---|---|\n")[2].strip()
    assert table == "\n".join(rows(TrainConfig))


def test_the_example_is_read(tmp_path):
    block, adapter, *_ = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "run.yaml").write_text(block + adapter)
    config = read_train_config(tmp_path / "run.yaml")
    assert (config.init, config.optimizer.peak_lr) == ("checkpoint", 1e-5)
    assert config.adapter.ranks == {"*.experts.*": 2}
