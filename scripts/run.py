#!/usr/bin/env python
"""`jaxmoe run`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("run", sys.argv[1:], prog="run.py")
