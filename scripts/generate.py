#!/usr/bin/env python
"""`jaxmoe generate`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("generate", sys.argv[1:], prog="generate.py")
