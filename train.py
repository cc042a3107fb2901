import sys

from qtrain.cli import start

if __name__ == "__main__":
    sys.exit(start("train"))
