"""Write functions.jsonl: a document for each function of Python's standard library."""

import ast
import json
import sysconfig
from pathlib import Path

SHORTEST = 40  # characters


def main() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    with Path("functions.jsonl").open("w") as out:
        for path in [*sorted(root.glob("*.py")), *sorted(root.glob("*/*.py"))]:
            if "site-packages" in str(path) or "/test" in str(path):
                continue
            try:
                text = path.read_text()
                tree = ast.parse(text)
            except (SyntaxError, UnicodeDecodeError):  # files that show what is no Python
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    source = ast.get_source_segment(text, node)
                    if source and len(source) > SHORTEST:
                        out.write(json.dumps({"text": source}) + "\n")


if __name__ == "__main__":
    main()
