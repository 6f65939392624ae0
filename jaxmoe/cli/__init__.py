"""The command line: `jaxmoe NAME`, `python -m jaxmoe NAME`, or in a checkout `scripts/NAME.py`."""
