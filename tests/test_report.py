"""Laws of the report: nothing is lost, nothing that is shown can act, and each number stands beside its null."""

import builtins
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxwalk import report
from jaxwalk.analyses import Figure, Finding, Series

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><b>',
    "$\\frac{x}$",
    "\x1b[31m\x00",
    "é\u202e",
)


def finding(name="path_law", **changes) -> Finding:
    n = 12
    rng = np.random.default_rng(0)
    arrays = {
        "x": np.arange(n),
        "y": np.linspace(1, 0, n),
        "low": np.linspace(0.9, -0.1, n),
        "high": np.linspace(1.1, 0.1, n),
        "points": rng.normal(size=n),
        "colour": rng.uniform(size=(n, 3)),
        "shade": np.linspace(0, 1, n),
        "names": np.array([HOSTILE[i % len(HOSTILE)] + str(i) for i in range(n)]),
        "matrix": rng.normal(size=(3, 4)),
        "cells": np.array([[HOSTILE[(i + j) % len(HOSTILE)] for j in range(4)] for i in range(3)]),
    }
    figures = (
        Figure(f"{name}_lines", "Lines fall", "position", "nats",
               (Series("model", "y", "x", low="low", high="high"), Series(HOSTILE[0], "points", "x", dashed=True)),
               references={HOSTILE[1]: 0.5}),
        Figure(f"{name}_log", "Lines on log axes", "step", "nats", (Series("a", "y", "x"),), log_x=True, log_y=True),
        Figure(f"{name}_points", "Points", "a", "b",
               (Series("left", "y", "points", "points", colour="colour"),
                Series("right", "y", "points", "points", colour="shade")), equal_aspect=True, panels=True),
        Figure(f"{name}_bars", "Bars", "token", "p", (Series("law", "y", "names", "bars", low="low", high="high"),)),
        Figure(f"{name}_heat", "Heat", "to", "from", (Series("A", "matrix", style="heatmap", text="cells"),)),
    )  # fmt: skip
    return Finding(
        **{
            "name": name,
            "claim": f"a claim {HOSTILE[0]}",
            "measured": {"excess_loss": 0.0012345, "undefined": float("nan")},
            "interval": {"excess_loss": (0.001, 0.0015)},
            "null": {"untrained": 0.3, HOSTILE[1]: 1.0},
            "conventions": {"paths": 512, "note": HOSTILE[2]},
            "arrays": arrays,
            "figures": figures,
            "verdict": f"a verdict {HOSTILE[1]}",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    findings = [finding(), finding("belief_geometry")]
    rows = [{"step": i, "loss": 1 / (i + 1), "eval_loss": 1 / (i + 1), "excess_loss": 0.1 / (i + 1)} for i in range(5)]
    skipped = {"prompt": f"no prompt {HOSTILE[0]}"}
    result = report.write(findings, skipped, folder, title=HOSTILE[0], facts={HOSTILE[1]: HOSTILE[2]}, training=rows)
    return folder, findings, result


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_findings_are_strict_json_beside_their_nulls(written):
    folder, findings, result = written
    assert not result.notices, result.notices
    text = (folder / "findings.json").read_text("utf-8")
    assert "NaN" not in text
    data = json.loads(text)
    assert [d["name"] for d in data] == ["path_law", "belief_geometry"]
    assert data[0]["measured"] == {"excess_loss": 0.0012345, "undefined": None}
    assert data[0]["interval"] == {"excess_loss": [0.001, 0.0015]}
    assert data[0]["null"]["untrained"] == findings[0].null["untrained"]


def test_arrays_come_back(written):
    folder, findings, _ = written
    for f in findings:
        with np.load(folder / "arrays" / f"{f.name}.npz", allow_pickle=False) as arrays:
            assert set(arrays.files) == set(f.arrays)
            for name, array in f.arrays.items():
                np.testing.assert_array_equal(arrays[name], array)


def test_every_figure_is_drawn_twice_and_shows_something(written):
    import matplotlib.image

    folder, findings, _ = written
    for f in findings:
        for figure in f.figures:
            image = matplotlib.image.imread(folder / "figures" / f"{figure.name}.png")
            assert image[..., :3].std() > 0.01, figure.name
            svg = (folder / "figures" / f"{figure.name}.svg").read_text("utf-8")
            assert svg.count("<path") + svg.count("<image") > 5


def test_nothing_shown_can_act(written):
    folder, _, _ = written
    page = (folder / "report.html").read_text("utf-8")
    elements = Elements()
    elements.feed(page)
    tags = [tag for tag, _ in elements.seen]
    assert "img" not in tags
    assert tags.count("script") == len(re.findall(r"<script", page)), "every script element is one the page wrote"
    assert "alert(1)</script>" not in page
    for tag, attributes in elements.seen:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert any(a.get("http-equiv", "").lower() == "content-security-policy" for _, a in elements.seen)
    assert any(a.get("name") == "viewport" for _, a in elements.seen)


def test_labels_reach_plotly_without_markup(written):
    folder, _, _ = written
    page = (folder / "report.html").read_text("utf-8")
    specs = json.loads(re.search(r'<script[^>]*id="figures"[^>]*>(.*?)</script>', page, re.DOTALL).group(1))

    def strings(value):
        if isinstance(value, str):
            yield value
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from strings(part)

    labels = list(strings(specs))
    assert any("alert" in label for label in labels), "the hostile labels are there to be looked at"
    markup = re.compile(r"<(?!br>|/?b>|/?extra>)[a-zA-Z/]")
    assert not [label for label in labels if markup.search(label)]


def test_the_page_opens_with_the_picture_and_shows_the_rest(written):
    folder, _, _ = written
    page = (folder / "report.html").read_text("utf-8")
    assert page.index('id="picture"') < page.index("What this run shows")
    body = page[page.index("<body") :]
    assert body.index("Lines fall") < body.index("What this run shows")
    for shown in ("excess_loss", "0.001234", "no prompt", "undefined"):
        assert shown in body


def test_table_puts_each_number_beside_its_interval_and_null():
    text = report.table([finding()], {"prompt": "no prompt was given"}, width=100)
    assert re.search(r"excess_loss\s+0\.001234\s+\[0\.001, 0\.0015\]", text)
    assert re.search(r"vs untrained\s+0\.3", text)
    assert "prompt: no prompt was given" in text
    assert "\x1b" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_without_the_plotting_libraries_the_numbers_are_still_written(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("matplotlib", "plotly"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    result = report.write([finding()], {}, tmp_path, title="t")
    assert json.loads((tmp_path / "findings.json").read_text())
    assert (tmp_path / "arrays" / "path_law.npz").exists()
    assert any("jaxwalk[report]" in notice for notice in result.notices)
    assert not list(tmp_path.rglob("*.png"))


def test_a_figure_that_cannot_be_drawn_costs_only_itself(tmp_path):
    broken = Figure("broken", "Broken", "x", "y", (Series("short", "y", "wrong"),))
    good = finding()
    arrays = {**good.arrays, "wrong": np.arange(3)}
    result = report.write([finding(arrays=arrays, figures=(broken, *good.figures))], {}, tmp_path, title="t")
    assert any("broken" in notice for notice in result.notices)
    assert (tmp_path / "figures" / f"{good.figures[0].name}.png").exists()
    assert "could not be drawn" in (tmp_path / "report.html").read_text("utf-8") or "not drawn" in (
        tmp_path / "report.html"
    ).read_text("utf-8")
    assert not (tmp_path / "figures" / "broken.png").exists()
