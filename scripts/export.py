#!/usr/bin/env python
"""`jaxmoe export`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("export", sys.argv[1:], prog="export.py")
