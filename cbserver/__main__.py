"""`python -m cbserver` is the command line of cli.py."""
from .cli import main

if __name__ == "__main__":  # a process for HTTP imports this, too
    main()
