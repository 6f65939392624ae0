"""A workspace belongs to one run at a time, and errors say whether it is in use."""

import errno

import pytest

from jaxmoe.checkpoint.zarr.arrays import reason
from jaxmoe.errors import UserError
from jaxmoe.files.workspace import RESULT, prepared


def test_a_workspace_in_use_is_not_called_left(tmp_path):
    """Catches the advice to delete what another run is writing."""
    output = tmp_path / "out"
    with prepared(output) as workspace:
        with pytest.raises(UserError, match=r"out\.partial is being written by another run"):
            with prepared(output):
                pass
        (workspace / RESULT).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_workspace_that_is_left_is_said_so(tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UserError, match=r"out\.partial is left from an interrupted run; delete"):
        with prepared(tmp_path / "out"):
            pass


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("no [a]\nmore"), "no"), (ValueError(), "ValueError"), (KeyError(), "KeyError")],
)
def test_an_error_without_a_message_has_its_name(error, said):
    """Catches an IndexError in place of what went wrong."""
    assert reason(error) == said


def test_an_error_of_the_system():
    assert "No space" in reason(OSError(errno.ENOSPC, "No space left on device"))
