"""The commands: `jaxmoe NAME`, `python -m jaxmoe NAME` and, in a checkout, `scripts/NAME.py`."""
