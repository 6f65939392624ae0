"""Arrays of devices and stored arrays: each device's share is read, and written, block by block."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.mapping.tensors import BLOCK_BYTES
from jaxmoe.checkpoint.zarr.arrays import StoredArray, even_part
from jaxmoe.checkpoint.zarr.writer import Writer
from jaxmoe.progress import note_work


def block_shape(array: jax.Array) -> tuple[int, ...]:
    """The shape of a file's block: a device's share, or an even part of it."""
    share = array.sharding.shard_shape(array.shape)
    return tuple(even_part(share, array.dtype.itemsize, BLOCK_BYTES))


def write_shares(writer: Writer, stored: StoredArray, array: jax.Array) -> None:
    """Writes this host's shares of an array block by block, each replicated share once."""
    block = stored.grid.block
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        data = np.asarray(shard.data)
        begin = [span.indices(n)[0] for span, n in zip(shard.index, array.shape, strict=True)]
        blocks = []
        for start in itertools.product(*map(range, (0,) * data.ndim, data.shape, block)):
            part = tuple(slice(i, i + n) for i, n in zip(start, block, strict=True))
            index = tuple(slice(b + s.start, b + s.stop) for b, s in zip(begin, part, strict=True))
            blocks.append((stored, index, data[part]))
        writer.write(blocks)


def load_array(array: StoredArray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads an array into the dtype, sharding and shape of `target`, with zeros appended."""
    sharding = target.sharding
    devices_of = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(target.shape).items():
        devices_of[index or ()].append(device)
    shares = []
    for index, devices in devices_of.items():
        share = _read_share(array, index, target)
        shares += jax.block_until_ready([jax.device_put(share, device) for device in devices])
        note_work()
    return jax.make_array_from_single_device_arrays(target.shape, sharding, shares)


def _read_share(
    array: StoredArray, index: tuple[slice, ...], target: jax.ShapeDtypeStruct
) -> np.ndarray:
    """Reads a slice of `target`, which is the array with zeros appended along its axes."""
    ranges = [axis.indices(size)[:2] for axis, size in zip(index, target.shape, strict=True)]
    stored = [
        slice(min(start, size), min(stop, size))
        for (start, stop), size in zip(ranges, array.shape, strict=True)
    ]
    share = array.read(stored, dtype=jnp.dtype(target.dtype))
    padding = [
        (0, stop - start - size) for (start, stop), size in zip(ranges, share.shape, strict=True)
    ]
    return np.pad(share, padding) if any(map(any, padding)) else share
