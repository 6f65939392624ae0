"""Ways to damage a finished checkpoint or document, for tests that damage is noticed."""

import json

from jaxmoe.checkpoint.zarr.checksums import CHECKSUMS
from jaxmoe.checkpoint.zarr.manifest import MANIFEST, MARKER, STATE, ZARR


def made_old(folder, key):
    """Makes a checkpoint one of format 2, which has no manifest."""
    (folder / MANIFEST).unlink()
    for file in folder.glob(f"{STATE}/*/{CHECKSUMS}"):
        file.unlink()
    change_metadata(folder, key, {"format": 2})
    return folder


def change_metadata(folder, key, changes):
    """Replaces values of the metadata; those that are `...` are removed."""
    marker = json.loads((folder / MARKER).read_text())
    changed = marker["custom_metadata"][key] | changes
    kept = {name: value for name, value in changed.items() if value is not ...}
    marker["custom_metadata"][key] = kept
    (folder / MARKER).write_text(json.dumps(marker))


def change_description(folder, array, change):
    """Applies a function to what an array's `zarr.json` says."""
    file = folder / STATE / array / ZARR
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def exchange(one, other):
    """Gives each of two files or folders the other's place."""
    aside = one.with_name(one.name + ".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def flipped(content, byte):
    """A copy of some bytes in which one bit of a byte is flipped."""
    return content[:byte] + bytes([content[byte] ^ (1 << byte % 8)]) + content[byte + 1 :]
