"""One engine over all processes of a scheduler's step, or one for each of them."""

import argparse
import os

import jax

from jaxmoe.cli.launch import CLUSTER, find_launch, gpus_here, local_gpus

ENGINES = ("one", "each")


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --engines."""
    parser.add_argument(
        "--engines",
        choices=ENGINES,
        default="one",
        help="of several processes that a scheduler starts: one engine over all their devices, or "
        "each an engine of its own, which share the rows; default: %(default)s",
    )


def stand_alone() -> None:
    """Lets this process use its share of its host's GPUs, and join no others.

    Raises:
        UserError: if the host's processes cannot share its GPUs evenly.
    """
    launch = find_launch()
    os.environ[CLUSTER] = "off"
    if launch is not None and (gpus := local_gpus(launch, gpus_here())):
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, gpus)))
