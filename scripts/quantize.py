"""`qtrain quantize`, for those who have the repository."""

import sys

from qtrain.cli import start

if __name__ == "__main__":
    sys.exit(start("quantize"))
