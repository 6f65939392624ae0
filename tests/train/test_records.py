"""Records of a run: rates, operations, other places that they go to, and their picture."""

import contextlib
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from jaxmoe.config import SCOUT
from jaxmoe.errors import UserError
from jaxmoe.plan.model_flops import model_flops
from jaxmoe.plan.targets import peak_flops
from jaxmoe.train.config import OptimizerConfig, TrainConfig
from jaxmoe.train.curves import COLORS, OTHERS, SIZE, draw_losses
from jaxmoe.train.logs import log_package, open_log
from jaxmoe.train.metrics import Meter, record_of, without_not_finite
from jaxmoe.train.partition import everything
from tests.conftest import one_device

RECORD = {"step": 3, "loss": 1.5, "router_load": [[0.5, 0.5]], "dropped": 0}


def test_operations_of_a_step_of_scout():
    """Six for each active parameter and token; chunks of 8,192 in 36 layers; a frozen base four."""
    active = 16.14e9  # with the head, without the embedding
    short = model_flops(SCOUT, 1, 1, everything)
    assert short == pytest.approx(6 * active, rel=0.01)
    assert model_flops(SCOUT, 1, 1, lambda name: False) == pytest.approx(4 * active, rel=0.01)
    long = model_flops(SCOUT, 2, 32768, everything) - 2 * 32768 * 6 * active
    pairs = 12 * 32768**2 / 2 + 36 * 4 * 8192**2 / 2
    assert long == pytest.approx(2 * 12 * 40 * 128 * pairs, rel=0.05)


def test_peaks_by_the_names_of_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("TPU v5 lite") is None
    assert peak_flops("cpu") is None


def test_rates_of_a_meter(monkeypatch):
    clock = iter([0.0, 4.0, 4.0, 6.0])
    monkeypatch.setattr("jaxmoe.train.metrics.time.perf_counter", lambda: next(clock))
    meter = Meter(SCOUT, everything, one_device())
    meter._peak = 1e15
    tokens = np.zeros((2, 1024), np.int32)
    for _ in range(2):
        meter.count_step((tokens, tokens))
        meter.count_targets(1000.0)
    record = meter.speed(targets=True)
    flops = model_flops(SCOUT, 2, 1024, everything)
    assert record == {
        "tokens_per_second": 1024.0,
        "targets_per_second": 500.0,
        "seconds_per_step": 2.0,
        "model_flops": flops,
        "mfu": round(flops / 2 / 1e15, 4),
    }
    meter.restart()
    assert "targets_per_second" not in meter.speed(targets=False)


def test_a_skipped_step_has_no_numbers_that_json_lacks():
    record = record_of(4, {"loss": np.float32("nan"), "load": np.array([1, np.inf])}, 2.0, 0.1)
    json.dumps(known := without_not_finite(record), allow_nan=False)
    assert known["loss"] is None and known["load"] == [1.0, None]


def make_config(tmp_path, log_to):
    optimizer = OptimizerConfig(peak_lr=0.1)
    output = str(tmp_path / "run")
    return TrainConfig(
        model={"a": 1}, data=None, optimizer=optimizer, output=output, steps=1, log_to=log_to
    )


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    said = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *values: said.append(values), close=lambda: said.append("closed")
    )
    package = types.SimpleNamespace(SummaryWriter=lambda folder: said.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    with open_log(make_config(tmp_path, "tensorboard"), log_package("tensorboard")) as log:
        log(RECORD)
    folder = str(tmp_path / "run" / "tensorboard")
    assert said == [folder, ("loss", 1.5, 3), ("dropped", 0, 3), "closed"]


def test_wandb_gets_the_numbers_and_goes_on_with_its_run(tmp_path, monkeypatch):
    said = []
    run = types.SimpleNamespace(log=lambda numbers, step: said.append((numbers, step)))

    @contextlib.contextmanager
    def init(**settings):
        said.append((settings["id"], settings["resume"], settings["config"]["steps"]))
        yield run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for folder in ("", "", "other"):  # a run, the same again, and one of the same name elsewhere
        with open_log(make_config(tmp_path / folder, "wandb"), log_package("wandb")) as log:
            log(RECORD)
    assert said[1::2] == 3 * [({"loss": 1.5, "dropped": 0}, 3)]
    (first, *rest), again, other = said[0::2]
    assert first.startswith("run-") and rest == ["allow", 1]
    assert again[0] == first != other[0]


def test_a_package_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log_to wandb needs the package wandb .*; install it"):
        log_package("wandb")
    assert log_package(None) is None


def test_the_losses_are_drawn(tmp_path):
    """A falling loss is high on the left and low on the right, whatever else is in the records."""
    lines = [{"step": n, "loss": 5 - n} for n in (1, 2, 4)] + [{"step": 3, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").size == SIZE
    image = np.asarray(Image.open(tmp_path / "losses.png"))[60:]  # without the legend
    color = [int(COLORS["loss"][i : i + 2], 16) for i in (1, 3, 5)]
    y, x = np.nonzero((image == color).all(-1))
    assert y[x.argmin()] < y[x.argmax()] and x.max() - x.min() > 600
    more = [{"step": n, **{f"loss/source {i}": i + n for i in range(9)}} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in more))
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    colors = {tuple(x) for x in np.asarray(Image.open(tmp_path / "losses.png")).reshape(-1, 3)}
    assert {tuple(int(x[i : i + 2], 16) for i in (1, 3, 5)) for x in OTHERS} <= colors
    (tmp_path / "metrics.jsonl").write_text("")
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")  # nothing to draw
