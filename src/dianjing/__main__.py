"""`python -m dianjing`: the same as `dianjing`."""

import sys

from dianjing.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
