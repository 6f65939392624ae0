#!/usr/bin/env python
"""`jaxmoe batch`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("batch", sys.argv[1:], prog="batch.py")
