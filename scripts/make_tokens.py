#!/usr/bin/env python
"""`jaxmoe make-tokens`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

run_command("make-tokens", sys.argv[1:], prog="make_tokens.py")
