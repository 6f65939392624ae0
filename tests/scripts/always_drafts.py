"""`jaxmoe generate` with drafts in every step that has room for some, which it counts on stderr."""

import atexit
import sys

from jaxmoe.cli.main import run_command
from jaxmoe.generation import drafts, head_drafts

if __name__ == "__main__":
    drafts.OVERHEAD, head_drafts.GUESS = 1000, 0.0
    give, tried = drafts.Drafter.give, []

    def counted(self, groups):
        give(self, groups)
        tried.extend(draft for rows in groups for row in rows if row for draft in row.drafts)

    drafts.Drafter.give = counted
    atexit.register(lambda: print(f"{len(tried)} drafts", file=sys.stderr))
    run_command("generate", sys.argv[1:], prog="generate.py")
