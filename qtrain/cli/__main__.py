import sys

from qtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
