"""What the first process tells the others."""

import json

from jaxmoe import processes


def test_more_than_processes_can_be_told_at_once_is_an_error_of_all(monkeypatch):
    """Catches a length that overflows, at which all processes would end without a word."""
    monkeypatch.setattr(processes, "_MOST", 50)
    assert json.loads(processes._outcome(lambda: "x" * 20)) == {"value": "x" * 20}
    error = json.loads(processes._outcome(lambda: "x" * 60))["error"]
    assert "to tell the others at once" in error and "--block-rows" in error
