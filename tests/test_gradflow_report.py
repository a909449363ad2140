"""The report: one page that needs nothing else, says what the record says, and is whole or not there."""

from __future__ import annotations

import base64
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from gradflow_helpers import Classifier, read
from matplotlib import pyplot
from torch import Tensor, nn

import rnnkern
from rnnkern.gradflow import Flow, Record

pytestmark = pytest.mark.usefixtures("nothing_stays")

VOID = {"meta", "br", "img", "source", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element is closed, in its place; keeps what the page shows and refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.meta: dict[str, str] = {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs)
        if tag == "meta" and "name" in values:
            self.meta[values["name"]] = values["content"]
        if tag == "tr":
            self.rows.append([])
        for name in ("src", "srcset", "href", "action", "data"):
            if name in values:
                self.pictures.append(values[name])
        if tag == "img":
            assert values["alt"]
        assert not any(name.startswith("on") for name in values)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data.strip())


class Pair(nn.Module):
    def __init__(self, name: str = "second") -> None:
        super().__init__()
        self.first = rnnkern.RNN(3, 8, bidirectional=True)
        self.add_module(name, rnnkern.RNN(16, 4, 2))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(self.first(x)[0])[1][-1]


def train(model: nn.Module, steps: int = 4, **options: object) -> Flow:
    with rnnkern.watch(model, **options) as flow:  # type: ignore[arg-type]
        for _ in range(steps):
            model(torch.randn(12, 2, 3)).sum().backward()
            flow.read()
            flow.step()
    return flow


def test_page(tmp_path: Path) -> None:
    flow = train(Pair(), every=2)
    path = tmp_path / "flow.html"
    flow.report(path)
    page = Page(path)
    assert path.stat().st_size < 1 << 20
    assert os.listdir(tmp_path) == ["flow.html"]
    assert pyplot.get_fignums() == []

    for said in ("Gradient flow of Pair", "first (1 layer, both directions), second (2 layers)", "every 2 steps"):
        assert said in page.text
    assert "4 steps have ended; this page shows 2 of them, from step 0 to step 2" in page.text
    assert "Training step 2" in page.text
    assert f"PyTorch {torch.__version__}" in page.text and f"rnnkern {rnnkern.__version__}" in page.text
    assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d", page.text)


def test_opens_offline_and_on_a_phone(tmp_path: Path) -> None:
    train(Pair()).report(tmp_path / "flow.html")
    page = Page(tmp_path / "flow.html")
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.meta["viewport"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in page.source
    for outside in ("http:", "https:", "//", "url(", "@import", "<script", "<link", "<iframe"):
        without_pictures = re.sub(r"data:image/png;base64,[\w+/=]+", "", page.source)
        assert outside not in without_pictures, outside
    assert page.tags.count("img") == 3  # the curve and two modules
    assert len(page.pictures) == 6  # on light and on dark paper
    assert len(set(page.pictures)) == 6
    for picture in page.pictures:
        kind, data = picture.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")


def test_numbers_are_those_of_the_record(tmp_path: Path) -> None:
    flow = train(Pair())
    flow.report(tmp_path / "flow.html")
    rows = [row for row in Page(tmp_path / "flow.html").rows if row and row[0] != "layer"]
    rec = read(flow)
    expected = []
    for name, label, place in [
        ("first", "l0", (0, 0)),
        ("first", "l0 reverse", (0, 1)),
        ("second", "l0", (0, 0)),
        ("second", "l1", (1, 0)),
    ]:
        r = rec[name]
        numbers = [f"{v[place]:.2f}" for v in (r.log10_first, r.log10_last)]
        numbers += [f"{r.slope[place]:+.3f}", f"{r.horizon[place]:.0f}", str(r.zeros[place]), str(r.nonfinite[place])]
        expected.append([label, *(n.replace("-", "−") for n in numbers)])
    assert rows == expected


def test_zeros_and_nan(tmp_path: Path) -> None:
    """A gradient that is 0 everywhere, and one that is nowhere finite, have no horizon and no slope."""
    model = Classifier()
    for factor, expected in [
        (0.0, ["−∞", "−∞", "–", "–", "24", "0"]),
        (float("nan"), ["–", "–", "–", "–", "0", "24"]),
    ]:
        with rnnkern.watch(model) as flow:
            (model(torch.randn(12, 2, 3)).sum() * factor).backward()
            flow.report(tmp_path / "flow.html")
        assert Page(tmp_path / "flow.html").rows[-1] == ["l0", *expected]


@pytest.mark.parametrize("name", ["<script>alert('x')</script>", 'a"b&c', "$x$", "_hidden", "𝓡 名"])
def test_names_are_escaped(name: str, tmp_path: Path) -> None:
    train(Pair(name), 1).report(tmp_path / "flow.html")
    page = Page(tmp_path / "flow.html")
    assert "script" not in page.tags
    assert f"{name} (2 layers)" in page.text


def test_modules_without_a_gradient(tmp_path: Path) -> None:
    model = Pair()
    with rnnkern.watch(model, every=lambda step: step < 2) as flow:
        for _ in range(3):
            model.first(torch.randn(5, 2, 3))[0].sum().backward()
            flow.step()
        flow.report(tmp_path / "flow.html")
    page = Page(tmp_path / "flow.html")
    assert "second: no gradient has reached it" in page.text
    assert "steps that the caller chose" in page.text
    assert page.tags.count("img") == 2


def test_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a record has one, line by line."""
    monkeypatch.setattr(
        Record, "verdict", lambda self, needs: "rnn l0: learns 9 steps: few\n<the loss> needs 64", raising=False
    )
    train(Classifier()).report(tmp_path / "flow.html")
    page = Page(tmp_path / "flow.html")
    assert "Verdict rnn l0: learns 9 steps: few <the loss> needs 64" in page.text


def test_the_ring_is_in_the_picture(tmp_path: Path) -> None:
    """Nothing was read before the report: it shows what the ring has."""
    model = Classifier()
    with rnnkern.watch(model, keep=3) as flow:
        for _ in range(5):
            model(torch.randn(6, 2, 3)).sum().backward()
            flow.step()
        flow.report(str(tmp_path / "flow.html"))
    assert "this page shows 3 of them, from step 2 to step 4" in Page(tmp_path / "flow.html").text


def test_settings_of_matplotlib_stay(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    train(Classifier()).report(tmp_path / "flow.html")
    assert dict(matplotlib.rcParams) == before


# Writing


def test_nothing_recorded(tmp_path: Path) -> None:
    with rnnkern.watch(Classifier()) as flow, pytest.raises(RuntimeError, match="nothing has been recorded yet"):
        flow.report(tmp_path / "flow.html")
    assert os.listdir(tmp_path) == []


def test_an_old_report_stays_where_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, path = train(Classifier()), tmp_path / "flow.html"
    path.write_text("old")

    def fails(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=r"the report cannot be written: No space left on device: .*flow.html"):
        flow.report(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["flow.html"]
    monkeypatch.undo()
    flow.report(path)
    Page(path)


@pytest.mark.parametrize("path", ["missing/flow.html", "folder"])
def test_paths_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="the report cannot be written") as info:
        train(Classifier()).report(tmp_path / path)
    assert info.value.filename == str(tmp_path / path)
    assert type(info.value) is (FileNotFoundError if "/" in path else IsADirectoryError)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flow = train(Classifier())
    flow.report(tmp_path / "flow.html")
    for module in ("report", "plots"):
        monkeypatch.delitem(sys.modules, f"rnnkern.gradflow.{module}")
        monkeypatch.delattr(f"rnnkern.gradflow.{module}")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"need.? {package}: pip install rnnkern\[plot\]"):
        flow.report(tmp_path / "flow.html")
