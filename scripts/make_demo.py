#!/usr/bin/env python
"""Makes the demo model: see demo/make_demo.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # demo.make_demo is not installed

from demo.make_demo import main
from jaxmoe.cli.terminal import run

run(main)
