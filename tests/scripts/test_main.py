"""`jaxmoe NAME`: every command is there, as a subcommand and as a script of a few lines."""

import importlib
import runpy
import sys

import pytest

from jaxmoe.cli import main
from tests.scripts import FOLDER


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_a_module_and_a_script(name):
    module = name.replace("-", "_")
    assert callable(importlib.import_module(f"jaxmoe.cli.{module}").main)
    assert f'run_command("{name}"' in (FOLDER / f"{module}.py").read_text()


def test_the_first_argument_chooses_and_the_others_are_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxmoe", "export", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    assert capsys.readouterr().out.startswith("usage: jaxmoe export [-h]")


@pytest.mark.parametrize("arguments", [[], ["nothing"]])
def test_no_such_command_names_them_all(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["jaxmoe", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "COMMAND" in capsys.readouterr().err


def test_scripts_are_doors():
    """Catches code that a package cannot import, and helpers that only scripts share."""
    scripts = list(FOLDER.glob("*.py"))
    assert not [script.name for script in scripts if script.name.startswith("_")]
    assert sum(len(script.read_text().splitlines()) for script in scripts) <= 400


@pytest.mark.parametrize("name", main.COMMANDS)
def test_scripts_run_nothing_when_imported(monkeypatch, name):
    """Catches doors that the processes of a benchmark, which import the script, run once more."""
    monkeypatch.setattr(main, "run_command", lambda *_, **__: pytest.fail("it runs"))
    runpy.run_path(str(FOLDER / f"{name.replace('-', '_')}.py"), run_name="__mp_main__")
