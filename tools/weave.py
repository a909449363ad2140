"""Runs a script of cells and writes the page it makes: prose, code, what each cell printed, and its picture.

    python tools/weave.py docs/PAGE.py      # writes docs/PAGE.md, and docs/PAGE/*.png

The script has the percent format, which Jupyter (with Jupytext), VS Code, PyCharm and Spyder open as a notebook:

    # %% [markdown]                          prose, in comments
    # %%                                     code
    # %% NAME: what the picture shows        code whose last line is an expression with a .figure: NAME.png

Jupytext and nbconvert do this too, with 43 packages to install and pin; what this page needs of them is below.
"""

from __future__ import annotations

import ast
import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

HEAD = re.compile(r"^# %%(?P<head>.*)$", re.MULTILINE)


class Cell(NamedTuple):
    head: str  # behind the `# %%`
    text: str
    line: int  # where the text begins, counted from 0

    @property
    def is_prose(self) -> bool:
        return self.head == "[markdown]"


def cells_of(script: Path) -> list[Cell]:
    """The cells of a script; what stands before the first of them is for who edits it, and on no page."""
    source = script.read_text(encoding="utf-8")
    heads = list(HEAD.finditer(source))
    ends = [head.start() for head in heads[1:]] + [len(source)]
    return [
        Cell(head["head"].strip(), source[head.end() : end].strip("\n"), source.count("\n", 0, head.end()) + 1)
        for head, end in zip(heads, ends)
    ]


def prose(cell: Cell) -> str:
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in cell.text.splitlines())


def code(cell: Cell) -> str:
    return f"```python\n{cell.text}\n```"


def run(script: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """The page as text, and the names that the script has left; pictures go to ``folder``.

    Raises:
        ValueError: a cell's head names a picture, and its last line makes none.
    """
    space: dict[str, Any] = {"__name__": script.stem}
    parts = [f"<!-- Made by tools/weave.py from {script.name}: edit that, then `make {script.stem}`. -->"]
    for cell in cells_of(script):
        if cell.is_prose:
            parts.append(prose(cell))
            continue
        printed, value = _executed(cell, script, space)
        parts.append(code(cell))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        name, _, shows = cell.head.partition(": ")
        if name:
            if not hasattr(value, "figure"):
                raise ValueError(f"{script.name}: the last line of cell {name!r} must be a picture, got {value!r}")
            folder.mkdir(exist_ok=True)
            value.figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
            parts.append(f"![{shows}]({script.stem}/{name}.png)")
    return "\n\n".join(parts) + "\n", space


def _executed(cell: Cell, script: Path, space: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last line where that is an expression."""
    body = ast.increment_lineno(ast.parse(cell.text), cell.line).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), script, "exec"), space)
        value = eval(compile(ast.Expression(last.value), script, "eval"), space) if last else None
    return printed.getvalue(), value


if __name__ == "__main__":
    script = Path(sys.argv[1])
    page, _ = run(script, script.with_suffix(""))
    script.with_suffix(".md").write_text(page, encoding="utf-8")
