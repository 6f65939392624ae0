#!/usr/bin/env python
"""`jaxmoe read`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("read", sys.argv[1:], prog="read.py")
