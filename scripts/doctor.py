#!/usr/bin/env python
"""`jaxmoe doctor`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("doctor", sys.argv[1:], prog="doctor.py")
