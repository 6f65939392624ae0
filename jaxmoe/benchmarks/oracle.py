"""What benchmarks beside transformers share: the model in its layout, its scripts, the machine."""

import json
import os
import platform
import subprocess
from pathlib import Path

import jax

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.export import export
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device."""
    return MeshConfig().make(jax.devices()[:1])


def oracle_python() -> str:
    """The Python of an environment with torch and transformers.

    Raises:
        UserError: if no variable names it.
    """
    python = os.environ.get("JAXMOE_ORACLE_PYTHON")
    if not python:
        raise UserError("JAXMOE_ORACLE_PYTHON is not set; run `make bench`, which sets it.")
    return python


def write_model(folder: Path, config: Llama4Config, params: dict) -> Path:
    """Writes a model in the Hugging Face layout below a folder; returns its own folder."""
    layout = jax.sharding.NamedSharding(one_device(), jax.sharding.PartitionSpec())
    store.save(folder / "checkpoint", config, jax.device_put(params, layout))
    export(folder / "checkpoint", folder / "model")
    return folder / "model"


def run_script(python: str, name: str, *arguments) -> dict:
    """The JSON object that a script of this folder prints last, run by another Python.

    Raises:
        UserError: if the script fails.
    """
    command = [python, Path(__file__).with_name(name), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"JAXMOE_ORACLE_PYTHON={python} cannot be run: {error.strerror}.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it returned {done.returncode}"]
        raise UserError(f"{python} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """The processor and its number of cores."""
    return {"processor": _processor(), "cores": os.cpu_count(), "dtype": "float32"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
