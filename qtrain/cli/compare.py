"""Compare finished runs: validation losses, and gaps to a baseline paired by seed. Runs of several sizes and budgets
stand in one table, each compared with the baseline of its own.

qtrain compare runs/ --baseline bf16 --csv results.csv
qtrain compare experiments/recipes/results.csv --plot gaps.png
"""

from __future__ import annotations

from pathlib import Path

from qtrain.cli import command_parser
from qtrain.errors import UserError


def main() -> None:
    parser = command_parser("compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of run directories, or results files")
    parser.add_argument("--baseline", default="bf16", help="the name of the runs to compare with (default: bf16)")
    parser.add_argument("--csv", type=Path, help="write one row a run to this file")
    parser.add_argument("--plot", type=Path, help="draw the gaps into this file (png, pdf, svg)")
    parser.add_argument("--published", type=Path, help="a file of name,gap,source to show beside ours")
    arguments = parser.parse_args()
    for path in (arguments.csv, arguments.plot):
        if path and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it")
    from qtrain.report.curves import plot_comparisons
    from qtrain.report.summaries import compare_all, comparison_table, read_published, read_summaries
    from qtrain.runs.table import write_csv

    rows = read_summaries(*arguments.runs)
    published = read_published(arguments.published) if arguments.published else {}
    print(comparison_table(rows, arguments.baseline, published))
    if arguments.plot:
        plot_comparisons(compare_all(rows, arguments.baseline), arguments.plot, published)
    if arguments.csv:
        write_csv(rows, arguments.csv)
