"""Where tests run the Hopper kernels: in JAX's GPU interpreter, or with JAXMOE_TEST_GPU=1 on a GPU.

Both run the same cases, which have the mark `hopper`.
"""

import contextlib
import os
from unittest import mock

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

ON_GPU = os.environ.get("JAXMOE_TEST_GPU", "0") != "0"
INTERPRET = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=True)


@contextlib.contextmanager
def no_races():
    """The GPU interpreter runs kernels inside, each of them free of races; a GPU just runs them."""
    if ON_GPU:
        yield
        return
    runs = []

    def record(**options):
        runs.append(new_state(**options))
        return runs[-1]

    new_state = gpu_callbacks.GPURaceDetectionState
    with mock.patch.object(gpu_callbacks, "GPURaceDetectionState", record):
        try:
            yield
        except BaseException:
            gpu_callbacks.reset_gpu_interpret_mode_state()
            raise
    assert runs and not any(run.races_found for run in runs)
