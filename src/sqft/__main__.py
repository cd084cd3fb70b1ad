"""``python -m sqft`` is ``sqft``."""

import sys

from sqft.cli import main

if __name__ == "__main__":
    sys.exit(main())
