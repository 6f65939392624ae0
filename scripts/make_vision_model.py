#!/usr/bin/env python
"""Makes the demo model that sees: see demo/vision/make_vision_model.py."""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # demo.vision.make_vision_model is not installed

from demo.vision.make_vision_model import main
from jaxmoe.cli.terminal import run

run(main)
