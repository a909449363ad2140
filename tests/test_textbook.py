"""docs/textbook.md is what its script makes, and what it shows is what the formulas say."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCRIPT = DOCS / "textbook.py"
weave = SimpleNamespace(**runpy.run_path(str(DOCS.parent / "tools" / "weave.py"), run_name="weave"))


def test_stored_page_has_the_cells_of_the_script() -> None:
    page = SCRIPT.with_suffix(".md").read_text(encoding="utf-8")
    at = 0
    for cell in weave.cells_of(SCRIPT):
        text = weave.prose(cell) if cell.is_prose else weave.code(cell)
        assert text in page[at:], f"docs/textbook.py has changed at line {cell.line}: make textbook"
        at = page.index(text, at) + len(text)


def test_line_of_an_error_is_that_of_the_script(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("# %% [markdown]\n# prose\n\n# %%\na = 1\n\na / 0\n")
    with pytest.raises(ZeroDivisionError) as caught:
        weave.run(script, tmp_path / "page")
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno) == (script, 6)  # counted from 0
    script.write_text("# %% name: what it shows\na = 1\n")
    with pytest.raises(ValueError, match="last line of cell 'name' must be a picture, got None"):
        weave.run(script, tmp_path / "page")


@pytest.mark.usefixtures("nothing_stays")
def test_page(tmp_path: Path) -> None:
    """One run: it takes some seconds."""
    page, names = weave.run(SCRIPT, tmp_path / "textbook")
    the = SimpleNamespace(**names)
    formulas(the)
    initialisations(the)
    truncation_and_gates(the)
    naive(the)
    pictures = {path.name for path in (tmp_path / "textbook").iterdir()}
    stored = {path.name: path.stat().st_size for path in (DOCS / "textbook").iterdir()}
    assert pictures == set(stored) and max(stored.values()) < 60_000
    assert page == SCRIPT.with_suffix(".md").read_text(encoding="utf-8"), "make textbook"


def formulas(the: SimpleNamespace) -> None:
    """Sections 1 to 4."""
    for w, k in [(0.9, 10), (0.9, 50), (0.9, 100), (0.5, 20), (1.1, 100)]:
        record = the.chain(torch.tensor([[w]], dtype=torch.float64), the.silence(k + 1))
        assert the.left(record)[k] == pytest.approx(w**k, rel=1e-12)
    lags = np.arange(101)
    for g, record in the.radii.items():
        np.testing.assert_allclose(the.left(record), g**lags, rtol=1e-12)
        horizon = 100 if g >= 1 else math.floor(math.log(1e-3) / math.log(g))
        assert record.horizon.item() == horizon
        np.testing.assert_allclose(record.gain[0, 0, 1:], g, rtol=1e-13)
        assert record.verdict().names == ({"vanishing"} if g < 1 else {"exploding"} if g > 1 else set())
    for g, records in the.factors.items():
        saturation = [record.mean_saturation_factor.item() for record in records]
        assert saturation[0] == 1 and saturation == sorted(saturation, reverse=True)
        for record, factor in zip(records, saturation):
            assert record.mean_weight_factor.item() == pytest.approx(g, rel=1e-12)
            assert record.mean_gain.item() == pytest.approx(factor * g, rel=1e-12)
    chain = [torch.ones(2, dtype=torch.float64)]
    for _ in range(200):
        chain.append(chain[-1] @ the.W)
    true = torch.stack(chain).norm(dim=1).numpy() / math.sqrt(2)
    np.testing.assert_allclose(the.formula, true, rtol=1e-12)
    np.testing.assert_allclose(the.left(the.transient), true, rtol=1e-12)


def initialisations(the: SimpleNamespace) -> None:
    """Section 5."""
    for H, rnn in the.default.items():
        # u² of U(±1/√H) has the mean 1/(3H) and a standard deviation of √0.8 times that.
        mean_square = rnn.weight_hh_l0.detach().double().square().sum().item() / H
        assert abs(3 * mean_square - 1) < 4 * math.sqrt(0.8) / H
        share = the.records["default", H].mean_weight_factor.item()
        assert share == pytest.approx(1 / math.sqrt(3), rel=0.1)
        assert the.records["orthogonal", H].mean_weight_factor.item() == pytest.approx(1, abs=1e-6)
        horizons = [the.records[name, H].horizon.item() for name in ("default", "orthogonal", "identity")]
        assert horizons == sorted(horizons) and horizons[0] < horizons[1]


def truncation_and_gates(the: SimpleNamespace) -> None:
    """Sections 7 and 8."""
    np.testing.assert_allclose(the.left(the.cut)[:25], the.left(the.whole)[:25], rtol=1e-5)
    assert not the.left(the.cut)[25:].any() and the.left(the.whole)[25:].all()
    for b, record in the.gates.items():
        assert record.mean_gain.item() == pytest.approx(1 / (1 + math.exp(-b)), abs=0.02)  # what the page claims


def naive(the: SimpleNamespace) -> None:
    """Section 9: the record is within 1 % of the truth up to lag 120."""
    np.testing.assert_allclose(the.recorded, the.truth / the.truth[0], rtol=0.01)
    assert np.flatnonzero(the.at_output).tolist() == [0]
    assert the.in_float32[60] > 0 and the.in_float32[100] == 0 and the.truth[100] > 0
