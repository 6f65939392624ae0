#!/usr/bin/env python
"""`jaxmoe convert`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

run_command("convert", sys.argv[1:], prog="convert.py")
