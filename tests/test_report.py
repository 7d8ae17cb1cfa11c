"""Laws of the report: nothing is lost, nothing that is shown can act, and each number stands beside its null."""

import base64
import builtins
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxwalk import report
from jaxwalk.analyses import Figure, Finding, Series
from jaxwalk.evidence.decision import Check, Quantity
from jaxwalk.report import _plots
from jaxwalk.report._layout import lay_out

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


def decided(name, shift, quantity="loss", label="untrained"):
    values = np.random.default_rng(0).normal(size=64) + shift
    contrast = Quantity(quantity, values, {"untrained": 0.0}).contrast(
        "untrained", "C2", f"it is {HOSTILE[0]}", at_least=0.5, label=label
    )
    check = Check("total_mass", abs(shift), 3.0, f"mass is 1 {HOSTILE[1]}")
    return finding(name, primary=(contrast,), checks=(check,), figures=())


def test_the_scoreboard_opens_terminal_and_page(tmp_path):
    findings = [decided("path_law", 2.0), decided("narrowing", -4.0, label=HOSTILE[4])]
    report.write(findings, {"prompt": "none"}, tmp_path, title="x")
    text = report.scores(findings, {"prompt": "none"}, width=100)
    assert len(text.splitlines()) < 20
    assert re.search(r"^C2  contradicted ", text, re.MULTILINE)
    assert "loss (narrowing): -3.933 vs 0" in text
    assert "predicted at least 0.5, p < 0.0001" in " ".join(text.split())
    assert "self-checks  FAILED narrowing.total_mass 4" in text
    assert "\x1b" not in text
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.index('id="scoreboard"') < page.index("The run" if "The run" in page else 'id="finding-0"')
    assert page.count('class="badge') >= 8 + 2
    assert "<script>alert" not in page
    assert report.scores([finding(figures=())], width=80).count("not testable here") == 8
    verbose = " ".join(report.table(findings, width=100).split())
    assert "primary C2 supported: loss: 2" in verbose
    assert "check passed: total_mass 2, at most 3" in verbose


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


@pytest.mark.parametrize(("columns", "cells"), [(4, "0.123"), (12, "0.123"), (40, None), (40, "1")])
def test_cells_that_would_run_into_each_other_are_left_blank(tmp_path, columns, cells):
    labels = np.full((2, columns), cells or "0.123")
    figure = Figure("heat", "t", "x", "y", (Series("a", "matrix", style="heatmap", text="cells"),))
    arrays = {"matrix": np.ones((2, columns)), "cells": labels}
    report.write([finding(arrays=arrays, figures=(figure,))], {}, tmp_path, title="t")
    drawn = (tmp_path / "figures" / "heat.svg").read_text("utf-8")  # each text as a comment beside its outlines
    assert (f"<!-- {labels[0, 0]} -->" in drawn) == (cells is not None)


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


def test_plotly_knows_every_property_it_is_given(written):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    folder, _, _ = written
    page = (folder / "report.html").read_text("utf-8")
    specs = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(specs) == 12  # five for each finding, and two curves of the training
    for spec in specs:
        for width in ("wide", "narrow"):
            graph_objects.Figure(data=spec["data"], layout=spec[width])  # raises on an unknown name or a bad value


def test_the_page_runs_its_own_two_scripts_and_no_other(written):
    folder, _, _ = written
    page = (folder / "report.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert re.search(r"script-src [^;]*", policy).group().count("sha256-") == 2
    assert "script-src 'unsafe-inline'" not in policy
    bodies = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    for body in bodies:
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "modeBarButtons:" in bodies[-1], "plotly's default buttons hold one that sends data to its cloud"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", ["_hidden", "$x^$", "漢字", "\U0001f600", "\ud800", "", "a\nb"])
def test_any_text_can_be_a_label(tmp_path, label):
    arrays = {"y": np.array([1.0, 2.0]), "names": np.array([label, "b"])}
    series = (Series(label, "y", "names", "bars"), Series("other", "y", "names", dashed=True))
    figure = Figure("f", label, label, label, series, references={label: 1.5})
    result = report.write([finding(arrays=arrays, figures=(figure,))], {label: label}, tmp_path, title=label)
    assert not result.notices
    assert "figures/f.svg" in result.paths
    report.table([finding(arrays=arrays, figures=())], {label: label}).encode()


def test_missing_numbers_are_gaps(tmp_path):
    nothing = np.full(4, np.nan)
    arrays = {"y": np.array([1.0, np.nan, 0.0, -1.0]), "x": np.arange(4), "nan": nothing, "one": np.ones(4)}
    arrays |= {"matrix": np.full((2, 2), np.nan)}
    figures = (
        Figure("gaps", "t", "x", "y", (Series("a", "y", "x", low="nan", high="one"),), log_x=True, log_y=True),
        Figure("nothing", "t", "x", "y", (Series("a", "nan", "x"),), references={"none": float("nan")}),
        Figure("blank", "t", "x", "y", (Series("a", "matrix", style="heatmap"),)),
        Figure("constant", "t", "x", "y", (Series("a", "one", "x", "points", colour="one"),), equal_aspect=True),
    )
    measured = {"none": float("nan"), "infinite": float("inf")}
    result = report.write(
        [finding(arrays=arrays, figures=figures, measured=measured, interval={})], {}, tmp_path, title="t"
    )
    assert not result.notices
    assert json.loads((tmp_path / "findings.json").read_text())[0]["measured"] == {"none": None, "infinite": None}
    assert "Not drawn on the logarithmic axis: 2 values at or below 0." in (tmp_path / "report.html").read_text("utf-8")


def test_step_zero_keeps_its_place_on_a_logarithmic_axis():
    arrays = {"y": np.array([3.0, 2.0, 1.0]), "x": np.array([0, 10, 1000])}
    layout = lay_out(Figure("f", "t", "x", "y", (Series("a", "y", "x"),), log_x=True), arrays)
    drawn = layout.panels[0].marks[0].x
    assert 0 < drawn[0] < 10
    assert (float(drawn[0]), "0") in layout.panels[0].x.ticks


def test_a_failure_of_one_renderer_is_told_and_costs_nothing_else(tmp_path, monkeypatch):
    good = finding()
    real = _plots.interactive_figure

    def fails(layout):
        if layout.figure.title == "Bars":
            raise RuntimeError("no bars today")
        return real(layout)

    monkeypatch.setattr(_plots, "interactive_figure", fails)
    result = report.write([good], {}, tmp_path, title="t")
    assert ["no bars today" in notice for notice in result.notices] == [True]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("This figure was not drawn") == 1
    assert page.count('class="plot"') == len(good.figures) - 1


def test_figures_of_one_name_and_names_that_are_no_file_names(tmp_path):
    arrays = {"y": np.arange(3.0), "a/../../b": np.arange(2)}
    figures = tuple(Figure(name, "t", "x", "y", (Series("a", "y"),)) for name in ("same", "same", "../up", "..."))
    result = report.write([finding(arrays=arrays, figures=figures)], {}, tmp_path / "deep" / "er", title="t")
    assert len([p for p in result.paths if p.endswith(".png")]) == 4
    assert all(path.exists() for path in result.paths.values())
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")} == {"deep"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_bars_over_recurring_names_stay_apart():
    arrays = {"y": np.arange(3.0), "names": np.array(["a", "a", "b"])}
    figure = Figure("f", "t", "x", "y", (Series("p", "y", "names", "bars"), Series("q", "y", "names", "bars")))
    panel = lay_out(figure, arrays).panels[0]
    assert [name for _, name in panel.x.ticks] == ["a", "a", "b"]
    assert len({*panel.marks[0].x, *panel.marks[1].x}) == 6


def test_the_report_is_imported_without_jax_or_a_plotting_library():
    code = "import sys, jaxwalk.report; print({'jax', 'matplotlib', 'plotly'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_null_stands_by_the_number_it_belongs_to():
    one = finding(
        measured={"r2": 0.9, "r2.first": 0.5, "error": 0.1},
        interval={},
        null={"r2.untrained": 0.4, "chance": 0.3, "error.exact": 0.0, "r2.first.untrained": 0.2},
    )
    lines = [line.split()[:-1] for line in report.table([one]).splitlines() if line.startswith("  ")]
    names = [" ".join(words) for words in lines[lines.index(["measured", "value", "95%"]) + 1 :]]
    assert names == ["r2", "vs untrained", "vs chance", "r2.first", "vs untrained", "error", "vs exact"]
