"""Which config a kernel takes: the one in its device's file, or one that fits."""

import dataclasses
import functools
import itertools
import json

import jax
import pytest

from jaxmoe.benchmarks.tuning_problems import all_problems
from pallas_kernels import mosaic, tuning
from pallas_kernels.attention import (
    coords_of,
    decode_attention,
    flash_mosaic,
    tpu_plan,
    tpu_tiles,
)
from pallas_kernels.attention.decode import DecodeCase
from pallas_kernels.attention.decode_config import (
    MAX_COLUMNS,
    DecodeConfig,
    config_for,
    smem_bytes,
    untuned_config,
)
from pallas_kernels.attention.flash import FlashCase
from pallas_kernels.attention.mosaic_backward import BackwardConfig
from pallas_kernels.attention.mosaic_forward import ForwardConfig
from pallas_kernels.attention.paged import PagedCase
from pallas_kernels.attention.tpu_tiles import PagedTpuConfig
from pallas_kernels.compile.absent import absent_h100s, absent_h200s, lower_for, mesh_of
from pallas_kernels.platform import Target
from tests.pallas_kernels.test_absent_gpu import FORMATS, cache, shaped

DEVICES = [absent_h100s, absent_h200s]
HOPPER = "NVIDIA H100 80GB HBM3"


def decode_case(format="int8", head_dim=128, columns=8, page=None):
    return DecodeCase(8, columns, 1, 1, 131072, head_dim, "bfloat16", format, page, 0.1)


def flash_case(head_dim):
    return FlashCase(1, 40, 8, 8192, 8192, head_dim, "bfloat16", 0.1)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Writes a device's entries and goes on as on that device."""

    def write(*entries, device=HOPPER):
        monkeypatch.setattr(tuning, "FOLDER", tmp_path)
        monkeypatch.setattr(tuning, "target", lambda: Target("gpu", device, 132))
        named = (dict(zip(("op", "key", "config"), entry, strict=True)) for entry in entries)
        tuning.file_of(HOPPER).write_text(json.dumps({"entries": list(named)}))

    tuning._configs.cache_clear()
    yield write
    tuning._configs.cache_clear()


KEY = {"cache": "int8", "head_dim": 128, "columns": 8}


def test_entry_is_found_by_its_whole_key(tuned):
    tuned(("decode", KEY, {"block_k": 64}), ("other", KEY, {"block_k": 128}))
    assert tuning.lookup("decode", **KEY) == {"block_k": 64}
    assert tuning.lookup("other", **KEY) == {"block_k": 128}
    assert tuning.lookup("decode", **KEY | {"columns": 16}) is None
    assert tuning.lookup("decode", **KEY | {"more": 1}) is None
    assert tuning.lookup("decode") is None


def test_other_devices_have_no_entry(tuned):
    tuned(("decode", KEY, {"block_k": 64}), device="NVIDIA H200")
    assert tuning.lookup("decode", **KEY) is None


def test_file_is_read_once(tuned):
    tuned(("decode", KEY, {"block_k": 64}))
    tuning.lookup("decode", **KEY)
    tuning.file_of(HOPPER).unlink()
    assert tuning.lookup("decode", **KEY) == {"block_k": 64}


def test_kernels_take_their_entries(tuned):
    tuned(
        ("flash_forward", {"head_dim": 64}, {"block_k": 64, "slots": 4}),
        ("flash_backward", {"head_dim": 128}, {"block_k": 128}),
        ("decode", KEY, {"block_k": 128, "slots": 2}),
    )
    other = flash_mosaic.FlashMosaicConfig()
    assert flash_mosaic.config_for(flash_case(64)) == dataclasses.replace(
        other, forward=ForwardConfig(64, 4)
    )
    assert flash_mosaic.config_for(flash_case(128)) == dataclasses.replace(
        other, backward=BackwardConfig(block_k=128)
    )
    assert config_for(decode_case()) == DecodeConfig(128, 2)


def test_blocks_divide_pages(tuned):
    """Catches blocks that reach into the next page, which may be another row's."""
    tuned(("decode", KEY, {"block_k": 128}))
    assert config_for(decode_case(page=256)).block_k == 128
    assert config_for(decode_case(page=192)).block_k == 64


@pytest.mark.absent_gpu
@pytest.mark.parametrize("columns", [8, 24, MAX_COLUMNS])
@pytest.mark.parametrize("format, head_dim", FORMATS)
def test_shared_memory_is_what_the_compiler_finds(format, head_dim, columns):
    """With far too many slots: then it says how much they take."""
    config = DecodeConfig(block_k=128, slots=17)
    kv, q = cache(format, 8, 1024, head_dim), shaped(8, 8 * columns, 1, head_dim)
    options = {"scale": 0.1, "implementation": "mosaic_gpu", "config": config}
    function = functools.partial(decode_attention, **options)
    expected = smem_bytes(decode_case(format, head_dim, columns), config)
    with pytest.raises(ValueError, match=f"smem_bytes={expected} >"):
        lower_for(*absent_h100s(1), function, q, kv, kv, jax.eval_shape(lambda: coords_of(8, 1)))


@pytest.mark.parametrize("columns", range(8, MAX_COLUMNS + 1, 8))
@pytest.mark.parametrize("format, head_dim", FORMATS)
def test_untuned_config_takes_what_fits(format, head_dim, columns):
    case = decode_case(format, head_dim, columns)
    config = untuned_config(case)
    more = dataclasses.replace(config, slots=config.slots + 1)
    assert smem_bytes(case, config) <= mosaic.SMEM_BYTES
    assert config.slots == (3 if format == "bfloat16" else 4) or (
        smem_bytes(case, more) > mosaic.SMEM_BYTES
    )


def committed(make_device):
    """What is in the file of a device."""
    (device,) = make_device(1)
    figures = json.loads(tuning.file_of(device.device_kind).read_text())
    assert figures["device"] == device.device_kind
    return figures["entries"]


@pytest.mark.absent_gpu
@pytest.mark.parametrize("make_device", DEVICES)
def test_every_committed_config_is_used(make_device):
    """And so compiled by the tests for absent GPUs, which leave configs to the kernels."""
    with jax.sharding.use_abstract_mesh(mesh_of(*make_device(1)).abstract_mesh):
        for entry in committed(make_device):
            op, key = entry["op"], entry["key"]
            if op == "decode":
                used = config_for(decode_case(key["cache"], key["head_dim"], key["columns"]))
            else:
                used = flash_mosaic.config_for(flash_case(**key))
                used = getattr(used, op.removeprefix("flash_"))
            assert dataclasses.asdict(used) == entry["config"]


@pytest.mark.absent_gpu
@pytest.mark.parametrize("make_device", DEVICES)
def test_every_problem_has_one_entry(make_device):
    problems = [(problem.op, problem.key) for problem in all_problems()]
    assert [(entry["op"], entry["key"]) for entry in committed(make_device)] == problems


def test_problems_are_what_the_tests_for_absent_gpus_compile():
    decode = [
        ("decode", {"cache": format, "head_dim": head_dim, "columns": columns})
        for (format, head_dim), columns in itertools.product(FORMATS, (8, 24))
    ]
    flash = [
        (f"flash_{name}", {"head_dim": head_dim})
        for name, head_dim in itertools.product(("forward", "backward"), (64, 128))
    ]
    found = [(problem.op, problem.key) for problem in all_problems()]
    assert sorted(found, key=str) == sorted(decode + flash, key=str)


@pytest.mark.parametrize(
    ("rows", "keys", "block"),
    [(64, 16384, 2048), (64, 8191, 1024), (64, 4095, 512), (1, 16384, 4096), (1, 8192, 512)],
)
def test_tpus_take_tuned_blocks_for_many_keys(tuned, rows, keys, block):
    """Catches blocks that are most of a row, and an entry that serves few rows too."""
    tuned(("decode", {"cache": "int8", "head_dim": 128, "few_rows": False}, {"block_k": 2048}))
    case = DecodeCase(rows, 5, 1, 1, keys, 128, "bfloat16", "int8", 128, 0.1)
    assert tpu_plan.config_for(case).block_k == block


@pytest.mark.parametrize(("group", "block"), [(5, 512), (10, 256)])
def test_tpus_take_tuned_tiles(tuned, group, block):
    tuned(("paged", {"cache": "int8", "head_dim": 128}, {"block_q": 512}))
    facts = 1, group, 1, 8192, 2**20, 128, "bfloat16", "int8", 128, 0.1
    assert tpu_tiles.config_for(PagedCase(*facts)) == PagedTpuConfig(block, 2048)
