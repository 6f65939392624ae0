#!/usr/bin/env python
"""Writes the table of plans into docs/plan.md: see benchmarks/plan_table.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks.plan_table is not installed

from benchmarks.plan_table import main
from jaxmoe.cli.terminal import run

run(main)
