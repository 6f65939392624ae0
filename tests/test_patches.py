"""Names that tests replace are there: most of these tests are slow, and found it out last."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = [x for x in sorted(TESTS.rglob("*.py")) if "monkeypatch.setattr(" in x.read_text()]


def imported(tree: ast.Module) -> dict[str, str]:
    """What a file's names were imported from, as dotted names."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {x.asname: x.name for x in node.names if x.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
    return found


def looped(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """What the variables of loops over tuples stand for."""
    return {
        node.target.id: node.iter.elts
        for node in ast.walk(tree)
        if isinstance(node, ast.For)
        and isinstance(node.target, ast.Name)
        and isinstance(node.iter, ast.Tuple)
    }


def replaced(tree: ast.Module) -> Iterator[str]:
    """The dotted names of imported modules that a file replaces by `monkeypatch.setattr`."""
    names, loops = imported(tree), looped(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != "monkeypatch.setattr":
            continue
        match node.args:
            case [ast.Constant(str(name)), _]:
                yield name
            case [ast.Name(owner), ast.Constant(str(attribute)), _]:
                for one in loops.get(owner, [ast.Name(owner)]):
                    if isinstance(one, ast.Name) and one.id in names:
                        yield f"{names[one.id]}.{attribute}"


def is_there(name: str) -> bool:
    """Whether a dotted name is that of an attribute of a module, or of a class in one."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("file", FILES, ids=lambda x: x.stem)
def test_what_is_replaced_is_there(file):
    missing = [x for x in replaced(ast.parse(file.read_text())) if not is_there(x)]
    assert not missing


def test_a_name_that_moved_is_found():
    text = "from jaxmoe.model.kv_cache import full, ring\nfor x in (full, ring):\n"
    names = list(replaced(ast.parse(text + "    monkeypatch.setattr(x, 'paged_attention', 1)")))
    assert [is_there(name) for name in names] == [False, True]
