"""Writes signatures.jsonl: the functions of Python's standard library, each as the prompt of its documentation and the
completion of its signature. python experiments/finetune/data.py OUT"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LONGEST = 200  # characters of documentation and of a signature


def functions(text: str) -> Iterator[tuple[str, str]]:
    """(first paragraph of the documentation, signature) of each function that is documented."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (documentation := ast.get_docstring(node)):
            first = " ".join(documentation.split("\n\n")[0].split())
            node.body, node.decorator_list = [ast.Expr(ast.Constant(...))], []
            signature = ast.unparse(node).split("\n")[0]
            if len(first) <= LONGEST and len(signature) <= LONGEST:
                yield first, signature


def main(out: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not {"test", "tests", "site-packages"} & {*path.parts}]
    found: dict[tuple[str, str], None] = {}
    for path in files:
        try:
            found |= dict.fromkeys(functions(path.read_text()))
        except (SyntaxError, UnicodeDecodeError):  # files for the parser's own tests
            continue
    rows = ({"prompt": f'"""{first}"""\n', "completion": f"{signature}\n"} for first, signature in found)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(found)} functions in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
