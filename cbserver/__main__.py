"""`python -m cbserver` is the command line of cli.py."""
import signal

from .cli import main

if __name__ == "__main__":  # a process for HTTP imports this, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it loads: no traceback
    main()
