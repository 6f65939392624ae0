"""How often the kernels of a prefill step run their hot loops, which their bundles do not say.

The positions of tokens and the experts that they choose decide it at run time. Here it is computed
for the last chunk of one row, by the functions by which the kernels themselves decide:

- `paged_attention`: the visits of its plan, from the coordinates in the model's cache. A block of
  keys that needs no mask takes the path of the steady state, any other the dearest path. The pages
  of a block are taken to follow each other in the pool.
- `splash_mha`: the blocks of scores that its mask leaves; it steps over the others.
- `grouped_matmul`: its grid, with all blocks of rows that there is room for. That is an upper
  bound: 8,192 tokens that choose one of 16 experts fill 64 to 79 of 80 blocks.

Cores share what is parallel, and the one with most bundles counts.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.benchmarks.schedule.cases import ELEMENT_BYTES
from jaxmoe.benchmarks.schedule.tpu_cases import SCALE_BYTES
from jaxmoe.config import Llama4Config
from jaxmoe.model.kv_cache import (
    CacheKind,
    CacheStep,
    cache_kind,
    init_cache,
    plan_writes,
    round_capacity,
)
from jaxmoe.plan.targets import Target, absent_devices
from pallas_kernels.attention import Coords, flash_splash, tpu_tiles
from pallas_kernels.attention.flash import FlashCase
from pallas_kernels.attention.masks import Mask, coords_of
from pallas_kernels.attention.paged import PagedCase
from pallas_kernels.compile.absent import mesh_of
from pallas_kernels.compile.bundles import Code
from pallas_kernels.compile.tpu_schedule import hot_loop, hot_paths
from pallas_kernels.experts import grouped_tpu
from pallas_kernels.experts.grouped import GroupedCase
from pallas_kernels.tpu import num_cores

Shapes = list[tuple[int, ...]]
DTYPE = "bfloat16"  # of activations and matrices


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The last chunk of one row's prefill, on a device whose cache holds all of the row.

    Attributes:
        config: the model.
        context: tokens of the row, with those of the chunk.
        tokens: how many tokens the chunk has.
        kv: the format of the cache.
        target: the device.
    """

    config: Llama4Config
    context: int
    tokens: int
    kv: str
    target: Target

    def hot_bundles(self, name: str, code: Code, shapes: Shapes) -> int | None:
        """Bundles of all iterations of a kernel's hot loop, on the core that has most.

        Args:
            name: the operation's name, which begins with the kernel's.
            code: its code.
            shapes: those of its operands.

        Returns:
            None for an operation for which there is no rule.
        """
        rules: dict[str, Callable[[Code, Shapes], int]] = {
            "paged_attention": self._paged,
            "splash_mha": self._splash,
            "grouped_matmul": self._grouped,
        }
        found = (rule for start, rule in rules.items() if name.startswith(start))
        rule = next(found, None)
        return None if rule is None else rule(code, shapes)

    def _paged(self, code: Code, shapes: Shapes) -> int:
        """Visits of blocks of pages; the pool's size says which kind of cache is read."""
        rows, kv_heads, group, queries, head_dim = next(x for x in shapes if len(x) == 5)
        (pages, page), heads = shapes[-1], group * kv_heads
        mask, k_coords, table = self._read(pages)
        keys = page * table.shape[1]
        case = PagedCase(rows, heads, kv_heads, queries, keys, head_dim, DTYPE, self.kv, page, 1.0)
        config = self._on_device(tpu_tiles.config_for, case)
        many = config.pages(page)
        q_range, sizes = mask.key_range(self._new), (config.queries(queries), many, config.cores)
        tiles, _ = tpu_tiles.plan(q_range, k_coords, table, None, kv_heads, sizes)
        start, full_start, full_stop, stop, _ = map(np.asarray, tiles.visits)
        key = ELEMENT_BYTES[self.kv] * head_dim + SCALE_BYTES * (self.kv != "bf16")
        paths = [path.work.bundles for path in hot_paths(code, 2 * many * page * key)]
        full = full_stop - full_start
        bundles = full * paths[0] + (stop - start - full) * paths[-1]
        return int(bundles.reshape(config.cores, -1).sum(1).max())

    def _splash(self, code: Code, shapes: Shapes) -> int:
        """Iterations that compute a block of scores of some head, and those that compute none."""
        queries, key, _ = (x for x in shapes if len(x) == 3 and x[1] == self.tokens)
        (heads, length, head_dim), (kv_heads, *_) = queries, key
        facts = 1, heads, kv_heads, length, length, head_dim, DTYPE, 1.0, self._span_mask
        case = FlashCase(*facts, in_order=True)
        blocks = flash_splash.computed_blocks(case, flash_splash.config_for(case))
        loop, computed = hot_loop(code), -(-heads // self._cores) * blocks
        skipped = (loop.trips or computed) - computed
        return computed * loop.longest.work.bundles + skipped * loop.longest_idle.work.bundles

    def _grouped(self, code: Code, shapes: Shapes) -> int:
        """All tiles of outputs, for all blocks of rows."""
        (blocks, rows, D), *others = (x for x in shapes if len(x) == 3)
        weights = [jax.ShapeDtypeStruct(x, DTYPE) for x in others if x[1] == D]
        E, _, F = weights[0].shape
        config = self._on_device(grouped_tpu.config_for, GroupedCase(rows, E, D, F, DTYPE))
        n, _ = self._on_device(grouped_tpu.tile, weights, F, config)
        return -(-F // n // self._cores) * blocks * hot_loop(code).longest.work.bundles

    def _on_device[T](self, function: Callable[..., T], *arguments) -> T:
        """What a function gives which asks for the current device."""
        mesh = mesh_of(absent_devices(self.target)[0])
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    @property
    def _cores(self) -> int:
        return self._on_device(num_cores)

    @property
    def _new(self) -> Coords:
        return coords_of(1, self.tokens, start=self.context - self.tokens)

    @property
    def _span_mask(self) -> Mask:
        """The mask of layers whose queries see a bounded number of positions."""
        masks = (spec.mask for spec in self.config.attention_specs)
        return next(mask for mask in masks if mask.span is not None)

    def _read(self, pages: int) -> tuple[Mask, Coords, jax.Array]:
        """What a layer reads whose pool has so many pages: its mask, the keys, and their pages.

        A full cache is written before it is read, a ring afterwards.
        """
        for spec in self.config.attention_specs:
            step = self._steps[cache_kind(spec)]
            if len(step.pool.coords.segment) == pages:
                before = None if spec.mask.span is None else step.before
                return spec.mask, before or step.pool.coords, step.table[0]
        raise ValueError(f"no kind of cache has {pages} pages.")

    @functools.cached_property
    def _steps(self) -> dict[CacheKind, CacheStep]:
        """Where the chunk's tokens go in a cache that has all tokens before; its keys are small."""
        sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
        config = dataclasses.replace(self.config, **sizes)
        cache = init_cache(config, 1, round_capacity(self.context), jnp.bfloat16)
        _, cache = plan_writes(config, cache, coords_of(1, self.context - self.tokens))
        steps, _ = plan_writes(config, cache, self._new)
        return steps
