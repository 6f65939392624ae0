#!/usr/bin/env python
"""`jaxmoe evaluate`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("evaluate", sys.argv[1:], prog="evaluate.py")
