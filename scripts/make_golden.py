#!/usr/bin/env python
"""Makes the golden files, in the oracle's environment: see tests/golden/make.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # tests is not installed

from tests.golden.make import main

main()
