"""Makes golden.npz: what transformers' image processor does, with torchvision.

It runs in an environment of its own, Python 3.11 with torch 2.13, torchvision 0.28, transformers
5.23 and Pillow 13; torchvision's builds for the CPU are not on every index, and others only work
with what `import_torchvision` does, so the oracle's environment does without. From the root:

    PYTHONPATH=. python tests/images/make_golden.py FOLDER

FOLDER is `llama_models/resources` of the package llama-models, which has the photographs.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch

from tests.images.cases import (
    CUTS,
    SHOTS,
    STRIDE,
    TOKENS,
    TOKENS_PER_TILE,
    grids,
    modes,
    sizes,
)

FILE = Path(__file__).with_name("golden.npz")


def import_torchvision():
    """Lets a torchvision that was built for CUDA be imported beside a torch for the CPU."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    return library


class Found(Exception):
    """The size and the canvas that the processor has chosen."""


def canvases(module, cut, count):
    """Rows and columns of tiles, and the size on them, of each size."""
    processor = module.Llama4ImageProcessor()

    def resize(images, size, **_):
        return torch.zeros(1, dtype=torch.uint8).expand(1, 3, size.height, size.width)

    def pad(images, target_size):
        raise Found(images.shape[-2:], target_size)

    processor.resize, module.pad_to_best_fit = resize, pad
    found = []
    for height, width in sizes(count):
        image = torch.zeros(1, dtype=torch.uint8).expand(3, int(height), int(width))
        try:
            processor(
                image, max_patches=cut.max_tiles, resize_to_max_canvas=cut.resize_to_max_canvas,
                disable_grouping=True, input_data_format="channels_first",
            )  # fmt: skip
        except Found as what:
            (fitted, target) = what.args
            found.append([*(int(side) // 336 for side in target), *fitted])
    return np.array(found, np.uint16)


def pixels(module, shot, folder):
    """Some rows and columns of the tiles of a photograph, before they are normalized."""
    cut = shot.cut
    tiles = module.Llama4ImageProcessor()(
        shot.open(folder), max_patches=cut.max_tiles, do_rescale=False, do_normalize=False,
        resize_to_max_canvas=cut.resize_to_max_canvas, return_tensors="pt",
    )["pixel_values"]  # fmt: skip
    assert tiles.dtype == torch.uint8
    return tiles.permute(0, 2, 3, 1)[:, ::STRIDE, ::STRIDE].numpy()


def layout(processor, grid):
    """The tokens of a picture, as numbers of `TOKENS`."""
    names = re.findall(r"<\|.+?\|>", processor._prompt_split_image(None, grid, TOKENS_PER_TILE))
    return np.array([TOKENS.index(name) for name in names], np.uint8)


def main():
    library = import_torchvision()
    from transformers.image_transforms import convert_to_rgb
    from transformers.models.llama4 import image_processing_llama4 as module
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    golden = {f"pixels {name}": pixels(module, shot, sys.argv[1]) for name, shot in SHOTS.items()}
    golden |= {
        f"mode {name}": convert_to_rgb(image, return_numpy=True) for name, image in modes().items()
    }
    golden |= {
        f"layout {rows} x {columns}": layout(Llama4Processor, (rows, columns))
        for rows, columns in grids()
    }
    whole = module.pad_to_best_fit
    golden |= {f"canvas {name}": canvases(module, *case) for name, case in CUTS.items()}
    module.pad_to_best_fit = whole
    np.savez_compressed(FILE, **golden)
    del library
    print(FILE, FILE.stat().st_size)


if __name__ == "__main__":
    main()
