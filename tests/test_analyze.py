"""The command line of analysis: what a user types, and what they find in the folder."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk import training
from jaxwalk.analyses import Finding
from jaxwalk.config import MLPConfig
from tests.conftest import model_of
from tests.test_report import Elements
from tests.test_training import small

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "small"
    training.train(small(), workdir, out=io.StringIO())
    return workdir


COMMAND = runpy.run_path(str(ROOT / "analyze.py"))["main"]


def analyze(*arguments: object) -> subprocess.CompletedProcess:
    """The command line, in this process: a new one takes longer to start than most of these analyses."""
    out, err = io.StringIO(), io.StringIO()
    command = ["analyze.py", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = COMMAND()
        except SystemExit as done:
            status = done.code
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def test_one_analysis_with_a_prompt_and_all_that_is_written(run):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "analyze.py"), str(run), "--only", "path_law,prompt", "--prompt", "0 1 0"]
    command += ["--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "excess_loss" in done.stdout
    folder = run / "analysis"
    findings = json.loads((folder / "findings.json").read_text())
    assert [f["name"] for f in findings] == ["path_law", "prompt"]
    assert findings[0]["measured"]["excess_loss"] > 0
    assert findings[0]["produced_by"]["seed"] == 3
    assert findings[0]["produced_by"]["schema"] == 2
    assert all(f["null"] and f["conventions"] and f["verdict"] for f in findings)
    for finding in findings:
        with np.load(folder / "arrays" / f"{finding['name']}.npz") as arrays:
            assert arrays.files
    figures = {f.stem for f in (folder / "figures").glob("*.png")}
    assert figures
    assert figures == {f.stem for f in (folder / "figures").glob("*.svg")}
    elements = Elements()
    elements.feed((folder / "report.html").read_text("utf-8"))
    assert not [a for _, a in elements.seen if "http" in (a.get("src") or "") + (a.get("href") or "")]
    assert str(folder / "report.html") in done.stdout


def test_what_does_not_apply_says_why_and_the_rest_runs(run, tmp_path):
    done = analyze(run, "--only", "prompt,path_law", "--step", "0", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert re.search(r"not run +prompt \(--verbose says why\)", done.stdout)
    assert [f["name"] for f in json.loads((tmp_path / "out" / "findings.json").read_text())] == ["path_law"]


def test_the_scoreboard_is_short_and_names_every_claim(run, tmp_path):
    done = analyze(run, "--claim", "C1", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [line[:2] for line in done.stdout.splitlines() if re.match(r"C[1-8] ", line)] == [
        f"C{n}" for n in range(1, 9)
    ]
    assert len(done.stdout.splitlines()) <= 40
    names = {finding["name"] for finding in json.loads((tmp_path / "out" / "findings.json").read_text())}
    assert names == {name for name in jw.analyses.testing(["C1"]) if name != "prompt"}
    verbose = analyze(run, "--only", "path_law", "--verbose", "--out", tmp_path / "verbose")
    assert re.search(r"excess_loss +\d", verbose.stdout)
    listed = analyze("list")
    assert all(re.search(rf"^{name} \(", listed.stdout, re.MULTILINE) for name in jw.analyses.names())
    assert "--set path_law.samples=2000" in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claim", "C9"], "unknown claim 'C9'"),
        (["--claim", "C1", "--only", "path_law"], "either --only or --claim"),
    ],
)
def test_claims_that_cannot_be_asked_for(run, arguments, message):
    done = analyze(run, *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_nothing_to_say_leaves_the_report_that_is_there(run, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    done = analyze(run, "--only", "prompt", "--out", tmp_path)
    assert done.returncode == 1
    assert "nothing written" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]


def test_scalars_of_training(run, tmp_path):
    done = analyze(run, "--only", "training_walk", "--scalars", "path_law.total_mass", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "path_law.total_mass.last" in json.loads((tmp_path / "findings.json").read_text())[0]["measured"]


def test_options_of_analyses(run, tmp_path):
    settings = ("--set", "encoding_walk.stations=blocks", "--set", "encoding_walk.paths=9")
    done = analyze(run, "--only", "encoding_walk", *settings, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    conventions = json.loads((tmp_path / "findings.json").read_text())[0]["conventions"]
    assert conventions["stations"].startswith("blocks")
    assert conventions["paths"] == 9


def test_the_analysis_whose_picture_opens_the_report_comes_first():
    started = []

    def stop(name):
        started.append(name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jw.analyses.run(None, started=stop)
    assert started == ["belief_geometry"] != list(jw.analyses.names()[:1])


def test_an_analysis_that_breaks_costs_itself_only(monkeypatch):
    def broken(subject):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("jaxwalk.analyses.prompt.analyse", broken)
    finding = Finding("narrowing", "c", {"a": 1.0}, {}, {"n": 0.0}, {})
    monkeypatch.setattr("jaxwalk.analyses.narrowing.analyse", lambda subject: finding)
    seen = []
    findings, skipped = jw.analyses.run(None, ["prompt", "narrowing"], failed=lambda name, error: seen.append(name))
    assert (findings, seen) == ([finding], ["prompt"])
    assert skipped == {"prompt": "it broke: ZeroDivisionError: a bug"}
    with pytest.raises(ZeroDivisionError):
        jw.analyses.run(None, ["prompt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "path_lww"), "Did you mean 'path_law'"),
        (("--step", "13"), "expected one of 0, "),
        (("--step", "last"), "expected a number, best, latest or all"),
        (("--prompt", "0 2"), "'2'"),
        (("--prompt", ""), "empty prompt"),
        (("--out", "README.md"), "README.md"),
        (("--only", "training_walk", "--scalars", "path_law"), "expected 'analysis.number'"),
        (("--set", "path_law"), "--set: expected ANALYSIS.OPTION=VALUE, got 'path_law'"),
        (("--set", "path_lww.paths=8"), "Did you mean 'path_law'"),
        (("--set", "path_law.path=8"), "unknown option of path_law 'path'. Did you mean 'paths'"),
        (("--only", "cloud", "--set", "cloud.position=0"), "cloud: position: expected one from 1 to 7"),
        (("--set", "path_law.samples=many"), "path_law.samples: expected int, got 'many'"),
    ],
)
def test_bad_input(run, arguments, message):
    done = analyze(run, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_a_run(tmp_path):
    done = analyze(tmp_path)
    assert done.returncode == 1
    assert "expected a run's folder" in done.stderr


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A folder as Hugging Face's transformers writes it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    model = model_of(vocab_size=257, max_length=32, filter=MLPConfig(24, "gelu_tanh"), tied=True)
    jw.export(model, folder, jw.text.ByteVocabulary())
    return folder


def test_a_pretrained_model_with_a_prompt_and_a_text(pretrained, tmp_path, monkeypatch):
    text = tmp_path / "notes.md"
    text.write_text("the walk of a path through embedding space begins at one token vector, and goes on. " * 40)
    monkeypatch.chdir(tmp_path)
    done = analyze(pretrained, "--only", "encoding_walk,prompt,training_walk", "--prompt", "the", "--text", text)
    assert done.returncode == 0, done.stderr
    assert "not run      training_walk" in done.stdout  # a single model has no series, which costs itself only
    written = tmp_path / "analysis" / "tiny"
    assert not (pretrained / "analysis").exists()
    walk, prompt = json.loads((written / "findings.json").read_text())
    assert (walk["name"], prompt["name"]) == ("encoding_walk", "prompt")
    assert "lens_kl.untrained" in walk["null"]
    page = (written / "report.html").read_text("utf-8")
    for said in ("cut in pieces of 32 tokens", "there is no step 0", "notes.md"):
        assert said in page

    done = analyze(pretrained, "--only", "encoding_walk", "--out", tmp_path / "none")
    assert done.returncode == 1
    assert "give a text, with --text" in " ".join(done.stdout.split())


def test_a_text_in_place_of_a_runs_own_data(run, tmp_path):
    (tmp_path / "a.txt").write_text("0 1 0 " * 50)
    done = analyze(run, "--text", tmp_path / "a.txt")
    assert done.returncode == 1
    assert "symbols of a world" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "no such file"),
        (["--length", "16"], "length: expected a text"),
        (["--step", "3"], "step: expected a run's folder"),
        (["--prompt", "a" * 40], "at most"),
    ],
)
def test_bad_input_for_a_pretrained_model(pretrained, arguments, message):
    done = analyze(pretrained, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train.py", "analyze.py"])
def test_help_imports_nothing_heavy(script):
    """What is slow to import is imported when it is used; benchmarks/start_up.py has the seconds."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "usage: " + script in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "tyro" in imported
    assert not imported & {"jax", "flax", "optax", "orbax", "datasets", "matplotlib", "plotly"}


def test_a_finding_needs_a_null():
    with pytest.raises(ValueError, match="expected a null"):
        Finding("x", "c", {"a": 1.0}, {}, {}, {})
    with pytest.raises(ValueError, match="intervals of what was not measured: b"):
        Finding("x", "c", {"a": 1.0}, {"b": (0, 1)}, {"n": 0.0}, {})


def test_findings_of_a_step_of_a_series(run):
    subject = jw.analyses.open_subject(run)
    assert subject.series[0] == 0
    assert subject.at_step(0).step == 0
    with pytest.raises(ValueError, match="expected one of"):
        subject.at_step(3)
    paths = subject.paths(5)
    assert paths.shape == (5, 8)
    np.testing.assert_array_equal(paths, subject.paths(5))
