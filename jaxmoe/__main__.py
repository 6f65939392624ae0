"""`python -m jaxmoe`."""

from jaxmoe.cli.main import main

main()
