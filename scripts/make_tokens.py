#!/usr/bin/env python
"""`jaxmoe make-tokens`, in a checkout."""

import sys

from jaxmoe.cli.main import run_command

if __name__ == "__main__":
    run_command("make-tokens", sys.argv[1:], prog="make_tokens.py")
