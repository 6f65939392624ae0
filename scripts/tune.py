#!/usr/bin/env python
"""`jaxmoe tune`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("tune", sys.argv[1:], prog="tune.py")
