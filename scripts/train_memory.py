#!/usr/bin/env python
"""Compiles training steps for absent hardware: see benchmarks/train_memory.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks.train_memory is not installed

from benchmarks.train_memory import main
from jaxmoe.cli.terminal import run

run(main)
