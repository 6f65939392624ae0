#!/usr/bin/env python
"""`jaxmoe benchmark`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("benchmark", sys.argv[1:], prog="benchmark.py")
