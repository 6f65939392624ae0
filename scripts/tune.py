#!/usr/bin/env python
"""`jaxmoe tune`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

run_command("tune", sys.argv[1:], prog="tune.py")
