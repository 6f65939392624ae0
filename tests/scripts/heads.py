"""A random head of the small checkpoint, and scripts that draft with it whatever that costs."""

from pathlib import Path

from jaxmoe.checkpoint.heads import convert_head
from tests import tiny
from tests.eagle import head_config, head_tensors, target_ids

ALWAYS_DRAFTS = Path(__file__).parent / "always_drafts.py"


def convert_random_head(folder: Path, checkpoint: Path) -> list[int]:
    """Writes `folder / "head"`; returns the four tokens that it guesses."""
    config = head_config(draft_vocab_size=4)
    tensors = head_tensors(config, 5)
    published = tiny.write_checkpoint(folder / "published", config, tensors)
    convert_head(published, folder / "head", checkpoint)
    return target_ids(tensors).tolist()


def drafts_tried(counted: Path) -> list[int]:
    """How many drafts each process tried that was told to count there; 0 if killed early."""
    return [int(path.read_text() or 0) for path in counted.iterdir()]
