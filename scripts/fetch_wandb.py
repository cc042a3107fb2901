"""Make run directories of Weights & Biases runs, for every script that reads run directories.

python scripts/fetch_wandb.py runs/ --out fetched          # offline runs, somewhere below a folder
python scripts/fetch_wandb.py entity/project --out fetched # a project on the server
python scripts/compare_runs.py fetched
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from qtrain.errors import UserError
from qtrain.report.wandb_runs import fetch_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", help="a folder that holds offline runs, or entity/project")
    parser.add_argument("--out", type=Path, required=True, help="make the run directories in this folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        for directory in fetch_runs(arguments.place, arguments.out):
            print(directory)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
