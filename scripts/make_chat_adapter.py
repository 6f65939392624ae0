#!/usr/bin/env python
"""Makes the demo model's adapter for chats: see demo/chat/make_chat_adapter.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # demo.chat is not installed

from demo.chat.make_chat_adapter import main
from jaxmoe.cli.terminal import run

run(main)
