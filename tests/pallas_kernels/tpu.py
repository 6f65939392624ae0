"""Runs the TPU kernels in JAX's TPU interpreter: memory is NaN until it is written, reads outside
of an array raise, and data races are found.
"""

import contextlib

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@contextlib.contextmanager
def no_races():
    """The TPU interpreter runs kernels inside, each of them free of races."""
    try:
        yield
    except BaseException:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found
