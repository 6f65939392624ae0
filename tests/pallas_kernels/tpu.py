"""Runs the TPU kernels in JAX's TPU interpreter: memory is NaN until it is written, reads outside
of an array raise, and data races are found.
"""

import contextlib
from unittest import mock

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@contextlib.contextmanager
def no_races():
    """The TPU interpreter runs kernels inside, each of them free of races."""
    runs = []

    def record(**options):
        runs.append(new_state(**options))
        return runs[-1]

    new_state = interpret_pallas_call.RaceDetectionState
    with mock.patch.object(interpret_pallas_call, "RaceDetectionState", record):
        try:
            yield
        except BaseException:
            pltpu.reset_tpu_interpret_mode_state()
            raise
    assert runs and not any(run.races_found for run in runs)
