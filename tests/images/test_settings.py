"""Settings of pictures, from the vision tower and from a checkpoint's files."""

import dataclasses
import json

import pytest

from jaxmoe.config import VisionConfig
from jaxmoe.errors import UserError
from jaxmoe.images import ImageSettings, read_image_settings

VISION = VisionConfig()
PUBLISHED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Llama4ImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "max_patches": 16,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "resize_to_max_canvas": False,
    "size": {"height": 336, "width": 336},
}


def written(folder, content, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(content))
    return read_image_settings(folder, VISION)


def test_the_settings_of_the_releases(tmp_path):
    assert ImageSettings.of(VISION) == ImageSettings() == read_image_settings(tmp_path, VISION)
    assert written(tmp_path, PUBLISHED) == ImageSettings()
    small = dataclasses.replace(VISION, image_size=28)
    assert ImageSettings.of(small) == ImageSettings(tile_size=28, tokens_per_tile=1)


def test_a_checkpoint_may_ask_for_fewer_tiles_or_larger_ones(tmp_path):
    asked = PUBLISHED | {"max_patches": 4, "resize_to_max_canvas": True}
    wanted = ImageSettings(max_tiles=4, resize_to_max_canvas=True)
    assert written(tmp_path, asked) == wanted
    other = {"image_processor": {"max_patches": 2}, "processor_class": "Llama4Processor"}
    assert written(tmp_path, other, "processor_config.json") == ImageSettings(max_tiles=2)
    assert written(tmp_path, {"patch_size": 14}, "processor_config.json") == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": {"height": 448, "width": 448}},
        {"image_mean": [0.48, 0.45, 0.4]},
        {"image_std": [0.5, 0.5, "0.5"]},
        {"rescale_factor": 1},
        {"resample": 3},
        {"do_normalize": False},
        {"max_patches": 0},
        {"max_patches": True},
        {"max_patches": 10**9},
        {"resize_to_max_canvas": 1},
    ],
)
def test_other_steps_are_refused(wrong, tmp_path):
    """Catches pixels that the tower was not trained on."""
    (key,) = wrong
    with pytest.raises(UserError, match=rf"preprocessor_config\.json has {key} "):
        written(tmp_path, PUBLISHED | wrong)


def test_broken_files_are_named(tmp_path):
    for content in ("[1]", "{"):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(UserError, match="preprocessor_config"):
            read_image_settings(tmp_path, VISION)


@pytest.mark.parametrize("tiles", [0, -1, 2000])
def test_tiles_are_counted_from_one(tiles):
    with pytest.raises(UserError, match=f"max_tiles {tiles} is not from 1 to 1024"):
        ImageSettings(max_tiles=tiles)
