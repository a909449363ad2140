"""The tests that the documents point to are there, and those of the drop-in's rows run on a GPU where there is one."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#]+)[^)]*\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path = page.parent / target
        assert path.exists(), target
        if text.startswith("`test_") and not text.endswith(".py`"):
            name = text.strip("`")
            assert re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE), f"{name} is not in {target}"


def test_rows_of_the_drop_in_are_tested_on_a_gpu_too() -> None:
    """By every backend, or everywhere; what stays on the CPU gives its reason."""
    page = (ROOT / "docs" / "drop-in.md").read_text()
    links = set(re.findall(r"\[`(test_\w+)`\]\(\.\./tests/(test_\w+)\.py\)", page))
    assert len(links) > 100
    for name, file in sorted(links):
        module = importlib.import_module(file)
        test = getattr(module, name)
        of_module = getattr(module, "pytestmark", [])
        marks = [*getattr(test, "pytestmark", []), *(of_module if isinstance(of_module, list) else [of_module])]
        says = {mark.name: mark.args for mark in marks}
        on_gpu = "backend" in inspect.signature(test).parameters or "everywhere" in says
        assert on_gpu or says.get("cpu_only"), f"{name} in {file}.py is neither everywhere nor cpu_only"
