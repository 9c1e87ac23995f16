"""`python -m expunge.cli`."""

import sys

from . import main

sys.exit(main())
