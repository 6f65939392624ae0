#!/usr/bin/env python
"""`jaxmoe train`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("train", sys.argv[1:], prog="train.py")
