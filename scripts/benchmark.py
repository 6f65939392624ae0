#!/usr/bin/env python
"""`jaxmoe benchmark`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

run_command("benchmark", sys.argv[1:], prog="benchmark.py")
