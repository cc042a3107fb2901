"""Results of the benchmarks, JSON, as markdown.

    python kernels/bench/table.py kernels/bench/results/*.json
    python kernels/bench/table.py kernels/bench/results/*.json --into kernels/README.md

--into: writes the tables between the two lines of the file that begin with `<!-- results`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BETWEEN = re.compile(r"(?<=<!-- results: begin -->\n).*(?=<!-- results: end -->)", re.DOTALL)


def markdown(result: Mapping[str, Any]) -> str:
    """One result: what was measured on what, and its rows."""
    rows, machine = result["rows"], result["machine"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]
    lines = [
        f"**{result['name']}**, {machine['device']}, torch {machine['versions']['torch']}, "
        f"commit {(machine['commit'] or 'unknown')[:8]}",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def tables(paths: Iterable[Path]) -> str:
    """Of several results, by their files' names."""
    return "\n".join(markdown(json.loads(path.read_text())) for path in sorted(paths))


def put_into(text: str, found: str) -> str:
    """text with the tables in their place. ValueError where it has none."""
    if BETWEEN.search(text) is None:
        raise ValueError("there are no lines '<!-- results: begin -->' and '<!-- results: end -->'")
    return BETWEEN.sub(lambda _: f"\n{found}\n" if found else "", text)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    found = tables(options.results)
    if options.into is None:
        print(found)
        return
    try:
        options.into.write_text(put_into(options.into.read_text(), found))
    except ValueError as error:
        parser.error(f"--into {options.into}: {error}")


if __name__ == "__main__":
    main()
