"""A subcommand of `jaxmoe`, with drafts in every step that has room for some.

Each process writes how many it tried to a file of the folder COUNTED.
"""

import os
import sys
from pathlib import Path

from jaxmoe.cli.main import run_command
from jaxmoe.generation import drafts, head_drafts

if __name__ == "__main__":
    drafts.OVERHEAD, head_drafts.GUESS = 1000, 0.0
    give, tried = drafts.Drafter.give, []
    count = Path(os.environ["COUNTED"], str(os.getpid()))

    def counted(self, groups):
        give(self, groups)
        tried.extend(draft for rows in groups for row in rows if row for draft in row.drafts)
        count.write_text(str(len(tried)))

    drafts.Drafter.give = counted
    run_command(sys.argv[1], sys.argv[2:], prog="jaxmoe")
