#!/usr/bin/env python
"""Makes the demo model's draft head: see demo/eagle/make_head.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # demo.eagle.make_head is not installed

from demo.eagle.make_head import main
from jaxmoe.cli.terminal import run

run(main)
