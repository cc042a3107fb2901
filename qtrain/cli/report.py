"""Make one page of runs: table, curves, comparisons, laws, quantisation by layer, speed; it opens offline from disk.

qtrain report runs/ --out report.html
qtrain report runs/ experiments/recipes/results.csv --law law/law.json --out report.html

Beside report.html the folder report/ gets every figure as PDF and PNG, and the table of all runs as CSV and Parquet.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

from qtrain.cli import command_parser, this_command
from qtrain.errors import UserError

SCREENS = ("DISPLAY", "WAYLAND_DISPLAY")  # of these variables, graphical sessions on Linux set at least one


def main() -> None:
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of run directories, or results files")
    parser.add_argument("--out", type=Path, required=True, help="the page, an .html file")
    parser.add_argument("--law", type=Path, nargs="+", default=[], help="law.json of `qtrain fit`")
    parser.add_argument("--baseline", default="bf16", help="the recipe to compare with (default: bf16)")
    parser.add_argument("--figure", metavar="NAME", help="draw this figure alone, into the folder beside the page")
    parser.add_argument("--open", action="store_true", help="show the page in a browser, where there is a screen")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".html":
        raise UserError(f"--out {arguments.out} is no name of a page; give one that ends in .html")
    from qtrain.report.page import write_report

    places, command = (arguments.runs, arguments.out, arguments.law), this_command()
    problems = write_report(*places, arguments.baseline, command, arguments.figure)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if arguments.figure:
        print(f"{arguments.out.with_suffix('') / arguments.figure}.pdf and .png")
        return
    print(f"{arguments.out}, and single figures and tables in {arguments.out.with_suffix('')}/")
    if arguments.open:
        show(arguments.out)


def show(page: Path) -> None:
    """Opens a page in the browser. Without a screen it only says how: a browser for terminals would take the terminal
    over."""
    address = page.resolve().as_uri()
    has_screen = sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in SCREENS)
    if not has_screen or not webbrowser.open(address):
        print(f"open it in a browser: {address}")
