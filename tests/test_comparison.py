"""Runs side by side: every number is the one that the run's own files hold."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk import comparison, report, training
from jaxwalk.checkpoint import CheckpointError, Run, read_metrics
from jaxwalk.config import ConfigError
from jaxwalk.evidence.finding import Cell, Row, Section
from tests.test_analyze import analyze
from tests.test_report import Elements
from tests.test_training import small

FINDING = {
    "name": "path_law",
    "claim": "C2",
    "verdict": "",
    "measured": {"excess": 0.25, "mass": None},
    "interval": {"excess": [0.2, 0.3]},
    "null": {"untrained": 2.0, "excess.ngram": 0.5, "mass.exact": 1.0},
    "conventions": {},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = small()
    for name in ("attention", "causal_mean"):
        model = dataclasses.replace(config.model, aggregate=jw.aggregates.config(name))
        training.train(dataclasses.replace(config, model=model), folder / name, out=io.StringIO())
    (folder / "attention" / "analysis").mkdir()
    (folder / "attention" / "analysis" / "findings.json").write_text(json.dumps([FINDING]))
    return folder / "attention", folder / "causal_mean"


@pytest.fixture(scope="module")
def compared(runs):
    return comparison.compare(runs)


def section(compared, name):
    return {row.name: row for row in next(s for s in compared.sections if s.name == name).rows}


def test_facts_and_training_are_those_of_the_runs(runs, compared):
    assert compared.names == ("attention", "causal_mean")
    facts, trained = section(compared, "run"), section(compared, "training")
    for number, folder in enumerate(runs):
        run = Run(folder)
        model = run.model()
        assert facts["parameters"].cells[number].value == sum(a.size for a in jax.tree.leaves(model))
        state = jw.init_state(model, model.max_length)
        carried = sum(a.size for a in jax.tree.leaves(state.memory))
        assert facts["state at the longest path"].cells[number].value == carried
        scores = [row for row in read_metrics(folder / "metrics.jsonl") if "eval_loss" in row]
        assert trained["held-out loss"].cells[number].value == scores[-1]["eval_loss"]
        assert trained["held-out loss, least"].cells[number].value == min(row["eval_loss"] for row in scores)
        assert trained["excess over the ideal observer"].cells[number].value == scores[-1]["excess_loss"]
        np.testing.assert_array_equal(compared.arrays[f"eval_loss.{number}"], [row["eval_loss"] for row in scores])
        np.testing.assert_array_equal(compared.arrays[f"eval_loss.step.{number}"], [row["step"] for row in scores])
    # The mean carries one sum of a fixed size, attention a key and a value of every position.
    halves = [cell.value for cell in facts["state at half of it"].cells]
    wholes = [cell.value for cell in facts["state at the longest path"].cells]
    assert halves[1] == wholes[1]
    assert 2 * halves[0] == wholes[0]


def test_findings_stand_beside_their_nulls_and_gaps_are_named(runs, compared):
    rows = next(s for s in compared.sections if s.name == "path_law").rows
    assert [(row.name, row.against) for row in rows] == [
        ("excess", False),
        ("ngram", True),
        ("untrained", True),
        ("mass", False),
        ("exact", True),
    ]
    assert rows[0].cells == (Cell(0.25, (0.2, 0.3)), Cell(None))
    assert [row.cells[0].value for row in rows[1:]] == [0.5, 2.0, None, 1.0]
    assert any(note.startswith("causal_mean: it has not been analysed") for note in compared.notes)


def test_runs_of_different_tasks_are_said_to_be(runs, tmp_path):
    other = tmp_path / "attention"
    shutil.copytree(runs[0], other)
    definition = json.loads((other / "config.json").read_text())
    definition["config"]["steps"] += 10
    (other / "config.json").write_text(json.dumps(definition))
    (other / "analysis" / "findings.json").write_text("[{]")
    compared = comparison.compare([runs[0], other])
    assert compared.names == (str(runs[0]), str(other))  # two folders of one name
    assert any("differ in steps" in note for note in compared.notes)
    assert not any("differ in data" in note for note in compared.notes)
    assert any("cannot be read" in note for note in compared.notes)


def test_what_cannot_be_compared_says_so(runs, tmp_path):
    with pytest.raises(ConfigError, match="two or more different runs"):
        comparison.compare(runs[:1])
    with pytest.raises(ConfigError, match="two or more different runs"):
        comparison.compare([runs[0], runs[0]])
    with pytest.raises(CheckpointError, match="expected a run's folder"):
        comparison.compare([runs[0], tmp_path / "nothing"])


def test_the_terminal_and_the_page_hold_every_number_and_nothing_untrusted(compared, tmp_path):
    hostile = compared._replace(names=("<b>x", "y"), notes=("<script>alert(1)</script>",))
    text = report.comparison_table(hostile, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "0.25 [0.2, 0.3]" in text
    result = report.write_comparison(hostile, tmp_path)
    assert not result.notices
    assert set(result.paths) >= {"comparison.json", "compare.html", "arrays/comparison.npz", "figures/eval_loss.svg"}
    page = (tmp_path / "compare.html").read_text("utf-8")
    elements = Elements()
    elements.feed(page)
    assert "<script>alert" not in page
    assert not [tag for tag, _ in elements.seen if tag == "b"]
    assert "0.25 [0.2, 0.3]" in page
    data = json.loads((tmp_path / "comparison.json").read_text())
    (path_law,) = (s for s in data["sections"] if s["name"] == "path_law")
    assert path_law["rows"][0] == {
        "name": "excess",
        "against": False,
        "values": [0.25, None],
        "intervals": [[0.2, 0.3], None],
    }


def test_columns_that_do_not_fit_come_in_turns(compared):
    many = compared._replace(
        names=tuple(f"run number {n}" for n in range(9)),
        sections=(Section("s", "", (Row("loss", tuple(Cell(n) for n in range(9))),)),),
        notes=(),
    )
    lines = [line for line in report.comparison_table(many, width=60).splitlines() if line.strip().startswith("loss")]
    assert len(lines) > 1
    assert [int(n) for line in lines for n in line.split()[1:]] == list(range(9))


def test_the_command_line(runs, tmp_path):
    done = analyze("compare", *runs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert str(tmp_path / "out" / "compare.html") in done.stdout
    assert (tmp_path / "out" / "compare.html").is_file()
    failed = analyze("compare", runs[0])
    assert failed.returncode == 1
    assert "two or more different runs" in failed.stderr
    assert "Traceback" not in failed.stderr
