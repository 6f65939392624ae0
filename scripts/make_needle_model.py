#!/usr/bin/env python
"""Makes the needle model: see demo/needle/make_needle_model.py."""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # demo.needle.make_needle_model is not installed

from demo.needle.make_needle_model import main
from jaxmoe.cli.terminal import run

run(main)
