"""`python -m cbserver` is the command line of the last lesson."""
from .server import main

if __name__ == "__main__":
    main()
