"""`python -m cbserver` is the command line of cli.py."""
from .cli import main

main()
