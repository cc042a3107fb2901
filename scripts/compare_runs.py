"""Compare finished runs: validation losses, and gaps to a baseline paired by seed.

python scripts/compare_runs.py runs/ --baseline bf16 --csv results.csv
python scripts/compare_runs.py experiments/recipes/results.csv experiments/forward_scale/results.csv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qtrain.errors import UserError
from qtrain.report.summaries import compare, markdown, read_summaries, write_csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of run directories, or results files")
    parser.add_argument("--baseline", default="bf16", help="the name of the runs to compare with (default: bf16)")
    parser.add_argument("--csv", type=Path, help="write one row a run to this file")
    arguments = parser.parse_args()
    try:
        if arguments.csv and not arguments.csv.parent.is_dir():
            raise UserError(f"--csv {arguments.csv}: there is no folder {arguments.csv.parent}; make it")
        rows = read_summaries(*arguments.runs)
        print(markdown(compare(rows, arguments.baseline)))
    except UserError as error:
        sys.exit(f"error: {error}")
    if arguments.csv:
        write_csv(rows, arguments.csv)


if __name__ == "__main__":
    main()
