"""How large the code is: lines, files, long functions, long parameter lists, public names, places that name a measure.

python -m benchmarks.structure [FOLDER]        # src/secateur by default; any checkout of any version
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PARAMETERS, LINES = 6, 60
"""More of these than a function should have."""


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """All functions and methods, whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def parameters(function: ast.FunctionDef) -> int:
    """How many a caller may give."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of the body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def main() -> None:
    """Print one number a line."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "src/secateur")
    files = sorted(folder.rglob("*.py"))
    texts = [file.read_text() for file in files]
    trees = [ast.parse(text) for text in texts]
    every = [f for tree in trees for f in functions(tree)]
    names = [
        node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    naming = re.compile(
        r"\b(macs|params)_(before|after)\b|[\"'](macs|params)[\"']|\.(macs|params)\(|soft_(macs|params)"
    )
    hits = [[line for line in text.splitlines() if naming.search(line)] for text in texts]
    print(f"lines                                {sum(len(text.splitlines()) for text in texts):>6,}")
    print(f"files                                {len(files):>6,}")
    print(f"functions                            {len(every):>6,}")
    print(
        f"  of more than {PARAMETERS} parameters            {sum(parameters(f) > PARAMETERS for f in every):>6,}"
    )
    print(f"  of more than {LINES} lines                {sum(code_lines(f) > LINES for f in every):>6,}")
    print(f"  largest number of parameters       {max(map(parameters, every)):>6,}")
    print(f"names at module level without _      {sum(not name.startswith('_') for name in names):>6,}")
    print(f"lines that name MACs or parameters   {sum(map(len, hits)):>6,} in {sum(map(bool, hits))} files")


if __name__ == "__main__":
    main()
