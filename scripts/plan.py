#!/usr/bin/env python
"""`jaxmoe plan`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("plan", sys.argv[1:], prog="plan.py")
