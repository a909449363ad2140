"""The tests that the documents point to are there."""

from __future__ import annotations

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
