"""`python -m expunge`: the command line, for whoever has the package but not its script on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
