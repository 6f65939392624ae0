#!/usr/bin/env python
"""`jaxmoe convert`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("convert", sys.argv[1:], prog="convert.py")
