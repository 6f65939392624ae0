#!/usr/bin/env python
"""Writes the tables of figures into the documents: see benchmarks/write_tables.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks.write_tables is not installed

from benchmarks.write_tables import main
from jaxmoe.cli.terminal import run

run(main)
