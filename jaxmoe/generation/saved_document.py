"""Documents on disk: a long text is read once, saved as it is read, and asked about on any mesh.

A saved document is an Orbax checkpoint beside those of models (see `jaxmoe.checkpoint.store`): for
every global layer the keys and values of all tokens, in pages in the order of the text whatever
mesh they lay on; for every local layer those of the last chunk.

Reading writes `OUTPUT.partial` as it goes, and goes on there when it is run again. What is saved on
the way ends with a chunk, where no later token sees anything that local layers hold.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxmoe import mesh as meshes
from jaxmoe import processes
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.zarr.arrays import StoredArray
from jaxmoe.checkpoint.zarr.manifest import Finished, is_finished, open_finished
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.document import (
    PREFILL_CHUNK,
    Document,
    check_length,
    init_document,
    new_document,
    read,
)
from jaxmoe.generation.document_files import Array, DocumentFiles
from jaxmoe.generation.document_identity import check_same, model_identity, text_identity
from jaxmoe.generation.features import with_pictures
from jaxmoe.generation.request import Request
from jaxmoe.images.picture import Picture
from jaxmoe.mesh import current_mesh
from jaxmoe.model.adapters import one_adapter
from jaxmoe.model.kv_cache import (
    PAGE,
    Cache,
    cache_kind,
    cache_kinds,
    keys_spec,
    plan_writes,
    pool_spec,
    slot_shards,
)
from pallas_kernels.attention import Coords

KEY = "jaxmoe-document"  # of the custom metadata
REMEDY = "make one with jaxmoe read"
INTERVAL = 65_536  # tokens between two saves, about


@dataclasses.dataclass(frozen=True)
class _Part:
    """Keys, values or their scales of one layer.

    Attributes:
        name: of the array on disk.
        is_full: whether the layer keeps the full sequence; otherwise a ring.
        table: of the pages that the row has, in the layer's pool.
        page: tokens of a page.
        keys: an array, or its shape and dtype.
    """

    name: str
    is_full: bool
    table: Any
    page: int
    keys: Any

    @property
    def page_shape(self) -> tuple[int, ...]:
        """The shape of a page on disk, [K, t, ...]: tokens in pairs in a cache are not there."""
        _, heads, rows, *numbers = self.keys.shape
        return (heads, self.page, *(rows * count // self.page for count in numbers))


def read_document(
    config: Llama4Config,
    params: dict,
    tokens: Sequence[int] | np.ndarray,
    output: str | Path,
    *,
    kv: str | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    interval: int = INTERVAL,
    pictures: Sequence[Picture] = (),
    stop: Callable[[], bool] = lambda: False,
    adapter: str | None = None,
) -> Iterator[int]:
    """Reads a text on the current mesh and saves what `load_document` needs to go on from it.

    Interrupted and called again with the same arguments, on any mesh, it goes on after the last
    save; finished and called again, it does nothing.

    Args:
        tokens: the text, its begin-of-text token included.
        output: a folder, which must not exist or be empty.
        kv: how keys and values are stored: "bf16", "int8", "fp8" or "int4"; default: as parameters.
        prefill_chunk: tokens that one step takes, at most.
        interval: tokens between two saves; rounded up to whole chunks and pages.
        pictures: those whose features the image tokens of the text stand for, in order.
        stop: asked once after each chunk whether to end early, with all saved up to the last edge
            of local attention; on several processes it says the same on all.
        adapter: what `jaxmoe.checkpoint.peft.adapter_digest` says of the adapter of `params`, by
            which requests with the same one are told from others before a model is loaded.

    Yields:
        The number of tokens read, after each chunk; of a run that goes on, first what was saved.

    Raises:
        UserError: for a text that does not fit the context, image tokens that are not those of the
            pictures, an output that exists, one that another text or model is being read into, or a
            disk that is full.
    """
    check_length(config, len(tokens))
    unit = math.lcm(PAGE, config.attention_chunk_size or 1)
    interval = -(-interval // unit) * unit
    params = one_adapter(params, None)  # of several, none
    identity = model_identity(config, params, kv) | text_identity(tokens, pictures, params)
    identity |= {} if adapter is None else {"adapter": adapter}
    if is_finished(output) and open_finished(Path(output), KEY, REMEDY).metadata == identity:
        yield len(tokens)
        return
    (tokens,), place = with_pictures(config, params, {"the text": tokens}, [pictures])
    with DocumentFiles(Path(output), identity) as files:
        saved = files.saved
        if saved:
            document = _reopen(config, identity, files)
        else:
            document = _begin(config, params, identity, interval, files)
        yield saved
        chunks = {"prefill_chunk": prefill_chunk, "boundary": interval}
        steps = read(config, params, document, tokens, place=place, **chunks)
        for document in steps:
            stopped = stop() and document.length < len(tokens)
            if stopped or document.length % interval == 0:
                _save_pages(config, document, interval, files)
                files.note(document.length // unit * unit)  # later pages will be written again
            yield document.length
            if stopped:
                return
        _save_pages(config, document, interval, files)
        _save_rings(config, document, files)
        files.finish(KEY)


def document_length(path: str | Path) -> int:
    """Tokens of a saved document.

    Raises:
        UserError: if `path` is none that is finished.
    """
    return _length(open_finished(Path(path), KEY, REMEDY))


def document_adapter(path: str | Path) -> str | None:
    """The digest of a saved document's adapter, or None; errors are those of `document_length`."""
    return open_finished(Path(path), KEY, REMEDY).metadata.get("adapter")


def load_document(
    path: str | Path,
    config: Llama4Config,
    params: dict,
    room: int,
    progress: store.Progress = store.no_progress,
    *,
    rows: int = 1,
    adapter: str | None = None,
) -> Document:
    """A saved document on the current mesh, which may be another than it was read on.

    Args:
        path: a folder that `read_document` wrote.
        room: tokens of a question and its answer, at most; cut to the model's context.
        progress: called after every array.
        rows: how many questions of that size there is room for at once.
        adapter: the name of that of the questions, if the model has several.

    Raises:
        UserError: if it is unfinished or damaged, or was read by another model, with another
            adapter or in another dtype.
    """
    found = open_finished(Path(path), KEY, REMEDY)
    kv, length = found.field("kv", str), _length(found)
    own = one_adapter(params, adapter)
    check_same(found.metadata, model_identity(config, own, kv), f"{path} was read")
    check_length(config, length)
    room = min(room, config.max_position_embeddings - length)
    room = rows * room + (rows - 1) * PAGE * slot_shards()  # each may begin within a page
    read = _restore(config, kv, found.open_array, length, room, rings=True, progress=progress)
    return read._replace(adapter=adapter)


def load_document_for(
    path: str | Path,
    config: Llama4Config,
    params: dict,
    requests: Sequence[Request],
    rows: int,
    progress: store.Progress = store.no_progress,
) -> Document:
    """`load_document` with room for requests, of which up to `rows` are in work at once.

    Their adapter is the first one's, which all have, or the engine refuses them.
    """
    room, rows = max(request.length for request in requests), min(rows, len(requests))
    places = {"rows": rows, "adapter": requests[0].adapter}
    return load_document(path, config, params, room, progress, **places)


def _length(found: Finished) -> int:
    length = found.field("length", int)
    if length < 1:
        raise UserError(f"{found.path} has {length} tokens; {REMEDY}.")
    return length


# Writing


def _begin(
    config: Llama4Config,
    params: dict,
    identity: dict[str, Any],
    interval: int,
    files: DocumentFiles,
) -> Document:
    """An empty document; its parts get arrays on disk, [pages of text or ring, K, t, ...]."""
    document = new_document(config, params, identity["length"], identity["kv"])
    arrays: list[Array] = []
    for part in _parts(config, document.cache):
        pages, *page = shape = _stored_shape(part, document.cache, identity["length"])
        block = min(pages, interval // PAGE) if part.is_full else pages
        block_shape, page_shape = (block, *page), (1, *page)
        arrays.append((part.name, shape, part.keys.dtype, block_shape, page_shape))
    files.begin(sum(x.nbytes for x in jax.tree.leaves(document.cache.layers)), arrays)
    return document


def _reopen(config: Llama4Config, identity: dict[str, Any], files: DocumentFiles) -> Document:
    """The document of the tokens that an interrupted run saved."""
    saved, length = files.saved, identity["length"]
    files.reopen(part.name for part in _parts(config, _planned(config, identity["kv"], length)))
    opened = lambda name, *_: files.arrays[name]  # noqa: E731
    return _restore(config, identity["kv"], opened, saved, length - saved)


def _planned(config: Llama4Config, kv: str, capacity: int) -> Cache:
    """Shapes of a document's cache."""
    return jax.eval_shape(functools.partial(init_document, config, capacity, kv))


# Between a cache and the canonical order


def _parts(config: Llama4Config, cache: Cache) -> list[_Part]:
    parts, kinds = [], cache_kinds(config)
    for i, (spec, layer) in enumerate(zip(config.attention_specs, cache.layers, strict=True)):
        for path, keys in jax.tree.leaves_with_path(layer):
            name = ".".join(["layers", str(i), *(entry.name for entry in path)])
            pool = cache.pools[kinds.index(cache_kind(spec))]
            page = pool.coords.segment.shape[1]
            parts.append(_Part(name, cache_kind(spec).sharded, pool.table, page, keys))
    return parts


def _stored_shape(part: _Part, cache: Cache, length: int) -> tuple[int, ...]:
    """The shape on disk of a part: the pages of the whole text, or of a ring."""
    pages = -(-length // PAGE) if part.is_full else part.table.shape[2]
    return (pages, *part.page_shape)


def _save_pages(config, document: Document, interval: int, files: DocumentFiles) -> None:
    """Writes the pages of the tokens that are not saved yet, the first of which begins a page."""
    shards = document.cache.full.table.shape[0]
    first, stop = files.saved // PAGE, -(-document.length // PAGE)
    column, count = first // shards, interval // (PAGE * shards) + 2
    for part in _parts(config, document.cache):
        if not part.is_full:
            continue
        found = np.asarray(_columns(True, count, part.table, part.keys, column))
        in_order = np.swapaxes(found, 0, 1).reshape(-1, *part.page_shape)
        files.write(part.name, in_order[first - column * shards :][: stop - first], first)


def _save_rings(config: Llama4Config, document: Document, files: DocumentFiles) -> None:
    """Writes what the next token may see of local layers: the begun chunk; the rest is zeros."""
    for part in _parts(config, document.cache):
        if part.is_full:
            continue
        table = part.table
        found = np.array(_columns(False, table.shape[2], table, part.keys, 0)[0])
        data = found.reshape(-1, *part.page_shape)
        columns, _, page = data.shape[:3]
        slot = np.arange(columns * page).reshape(columns, page)
        np.swapaxes(data, 1, 2)[slot >= document.length % slot.size] = 0
        files.write(part.name, data, 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _columns(sharded: bool, count: int, table, keys, first):
    """Pages [shards, count, K, t, ...] of the only row from a column of its tables on."""

    def body(table, keys):
        columns = first + jnp.arange(count)
        return keys[table[0, 0].at[columns].get(mode="fill", fill_value=0)][None]

    mesh = current_mesh()
    if mesh is None:
        return body(table, keys)
    pages, heads = (*keys_spec(mesh, 1, sharded, keys), None, None)[:2]
    specs = (pool_spec(mesh, 1, sharded).table, PartitionSpec(pages, heads))
    found = meshes.per_device(body, specs, PartitionSpec(pages, None, heads))(table, keys)
    return meshes.on_all_devices(found) if processes.several() else found


def _restore(
    config: Llama4Config,
    kv: str,
    open_array: Callable[[str, tuple[int, ...], tuple[str]], StoredArray],
    length: int,
    room: int,
    *,
    rings: bool = False,
    progress: store.Progress = store.no_progress,
) -> Document:
    """A document of `length` tokens, with or without what local layers hold.

    Every array is opened before memory is taken for any.
    """
    planned = _planned(config, kv, length + room)
    arrays = {
        part.name: open_array(
            part.name, _stored_shape(part, planned, length), (part.keys.dtype.name,)
        )
        for part in _parts(config, planned)
        if part.is_full or rings
    }
    empty = init_document(config, length + room, kv)
    parts, shards, keys, done = _parts(config, empty), empty.full.table.shape[0], [], 0
    total = sum(part.keys.nbytes for part in parts)
    for part in parts:
        loaded = part.keys
        if part.name in arrays:
            pages = _stored_shape(part, empty, length)[0]
            loaded = _load(part, arrays[part.name], pages, shards if part.is_full else 1)
        keys.append(loaded)
        done += loaded.nbytes
        progress(done, total)
    layers = jax.tree.unflatten(jax.tree.structure(empty.layers), keys)
    return Document(_admit(config, empty._replace(layers=layers), length), length)


def _load(part: _Part, array: StoredArray, pages: int, shards: int) -> jax.Array:
    """A part loaded into the pages that an empty pool takes first: page 1 of each device and on."""
    shape, dtype, place = part.keys.shape, part.keys.dtype, part.keys.sharding
    held = shape[0] // shards  # by each device
    part.keys.delete()

    def share(index):
        start, stop, _ = index[0].indices(shape[0])
        assert stop - start == held
        first = min(start // held, pages)  # a short text has no page on the last devices
        found = array.read((slice(first, pages, shards), index[1]))
        out = np.zeros((held, found.shape[1], *shape[2:]), dtype)
        out[1 : 1 + len(found)] = found.reshape(len(found), *out.shape[1:])
        return out

    return jax.make_array_from_callback(shape, place, share)


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=1)
def _admit(config: Llama4Config, cache: Cache, length: int) -> Cache:
    """The cache with pages and coordinates of the text's tokens."""
    position = jnp.arange(length, dtype=jnp.int32)[None]
    return plan_writes(config, cache, Coords(position, jnp.ones_like(position)))[1]
