#!/usr/bin/env python
"""`jaxmoe read`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

run_command("read", sys.argv[1:], prog="read.py")
