"""Pretrained models of many steps of one training: on the hub, in its cache, and in a folder."""

import types

import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import NotApplicable, analyse
from jaxwalk.analyses.training_walk import _chosen
from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ConfigError
from jaxwalk.evidence.subject import Subject
from jaxwalk.pretrained import series
from tests.test_pretrained import edit, equal, exportable

PYTHIA = (0, *(2**k for k in range(10)), *range(1000, 144000, 1000))
OLMO2 = ("main", "stage1-step2000-tokens9B", "stage1-step150-tokens1B", "stage2-ingredient2-step150-tokens1B")


def step_model(step):
    return exportable("gpt2", vocab_size=3, max_length=8, seed=step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of three steps, one of a later stage, one half-written, and what is no step."""
    folder = tmp_path_factory.mktemp("series")
    for step, name in ((0, "step0"), (8, "step8-tokens1B"), (90, "checkpoint-90")):
        jw.export(step_model(step), folder / name)
    jw.export(step_model(5), folder / "stage2-step5")
    jw.export(step_model(6), folder / "best")
    (folder / "step100").mkdir()
    return folder


def on_the_hub(monkeypatch, branches, tags=()):
    hub = pytest.importorskip("huggingface_hub")
    named = lambda names: [types.SimpleNamespace(name=name) for name in names]
    refs = types.SimpleNamespace(branches=named(branches), tags=named(tags))
    monkeypatch.setattr(hub, "list_repo_refs", lambda repository: refs)
    return hub


# The names of steps.


def test_pythias_revisions(monkeypatch):
    names = [f"step{step}" for step in sorted(PYTHIA, key=str)]
    on_the_hub(monkeypatch, ["main", *names, "refs/convert/parquet", "step1000-backup"], ["v1.0", "step1000"])
    assert series("EleutherAI/pythia-70m") == {step: f"step{step}" for step in PYTHIA}
    assert list(series("EleutherAI/pythia-70m")) == list(PYTHIA)


def test_stages_of_olmo2(monkeypatch):
    on_the_hub(monkeypatch, OLMO2)
    source = "allenai/OLMo-2-1124-7B"
    assert list(series(source).items()) == [(150, OLMO2[2]), (2000, OLMO2[1])]
    assert series(source, "stage2-ingredient2") == {150: OLMO2[3]}
    with pytest.raises(ConfigError, match=r"unknown stage 'stage2'.*Choices: stage1, stage2-ingredient2"):
        series(source, "stage2")


@pytest.mark.parametrize("name", ["step1000-tokens4B", "step-1000", "step_1000", "checkpoint-1000", "step001000"])
def test_names_that_say_a_step(name, monkeypatch):
    on_the_hub(monkeypatch, [name, "main"])
    assert series("someone/something") == {1000: name}


def test_two_names_of_one_step(monkeypatch):
    on_the_hub(monkeypatch, ["step7", "checkpoint-7"])
    with pytest.raises(CheckpointError, match=r"step 7: expected one name, got 'checkpoint-7' and 'step7'"):
        series("someone/something")


def test_what_has_no_steps(monkeypatch, tmp_path, folder):
    on_the_hub(monkeypatch, ["main"])
    assert series("gpt2") == series(tmp_path) == series(folder / "step0") == series(tmp_path / "nowhere.gguf") == {}


# The hub.


def test_steps_on_the_hub_are_loaded_by_their_revisions(monkeypatch, folder, tmp_path):
    hub = on_the_hub(monkeypatch, ["main", "step0", "step8-tokens1B"])
    at = lambda revision: folder / ("best" if revision is None else revision)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repository, name, revision: str(at(revision) / name))
    monkeypatch.setattr(hub, "snapshot_download", lambda repository, revision, **options: str(at(revision)))
    equal(jw.load("someone/something", step=8)[0], step_model(8))
    equal(jw.load("someone/something", revision="step0")[0], step_model(0))
    equal(jw.load("someone/something")[0], step_model(6))
    with pytest.raises(CheckpointError, match=r"one of the 2 steps of someone/something, from 0 to 8, got 3.*: 0, 8\."):
        jw.load("someone/something", step=3)
    (tmp_path / "config.json").write_bytes((folder / "step0" / "config.json").read_bytes())
    monkeypatch.setattr(hub, "snapshot_download", lambda repository, revision, **options: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"at revision 'step0' has no safetensors.*'some.*, revision='step0'\)"):
        jw.load("someone/something", step=0)
    with pytest.raises(ConfigError, match="step: expected no revision beside it, got 'step0'"):
        jw.load("someone/something", revision="step0", step=8)


def test_without_a_network_the_steps_are_those_in_the_cache(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"'some/one'.*cannot be reached\. Give a folder with a sub-folder for each"
    ):
        series("some/one")
    refs = tmp_path / "models--some--one" / "refs"
    refs.mkdir(parents=True)
    for name in ("main", "step3"):
        (refs / name).write_text("0" * 40)
    assert series("some/one") == {3: "step3"}


@pytest.mark.parametrize(
    ("kind", "expected"), [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "no such rep")]
)
def test_what_the_hub_may_answer(monkeypatch, kind, expected):
    hub = pytest.importorskip("huggingface_hub")

    def answer(repository):
        raise getattr(hub.errors, kind).__new__(getattr(hub.errors, kind))

    monkeypatch.setattr(hub, "list_repo_refs", answer)
    with pytest.raises(CheckpointError, match=expected):
        series("someone/something")


# A folder.


def test_steps_in_a_folder(folder):
    assert series(folder) == {0: "step0", 8: "step8-tokens1B", 90: "checkpoint-90"}
    assert series(str(folder), "stage2") == {5: "stage2-step5"}
    for step in (0, 8, 90):
        equal(jw.load(folder, step=step)[0], step_model(step))
    equal(jw.load(folder)[0], step_model(90))
    with pytest.raises(CheckpointError, match=r"one of the 3 steps .*from 0 to 90, got 100\. Near it: 0, 8, 90\."):
        jw.load(folder, step=100)
    with pytest.raises(ConfigError, match=r"got 'best': .* has no evaluation losses"):
        jw.load(folder, step="best")


def test_steps_beside_the_model_that_they_led_to(tmp_path):
    jw.export(step_model(3), tmp_path)
    jw.export(step_model(2), tmp_path / "checkpoint-2")
    equal(jw.load(tmp_path)[0], step_model(3))
    equal(jw.load(tmp_path, step=2)[0], step_model(2))


# training_walk.


def subject(folder, steps):
    load = lambda step: jw.load(folder, step=step)[0]
    return Subject(load(steps[-1]), world=jw.worlds.mess3(), series=tuple(steps), load_step=load)


def test_training_walk_follows_a_folder(folder):
    finding = analyse("training_walk", subject(folder, list(series(folder))), {"scalars": ("path_law.excess_loss",)})
    assert list(finding.arrays["step"]) == [0, 8, 90]
    expected = [
        analyse("path_law", Subject(step_model(step), world=jw.worlds.mess3()), {"light": True}).measured["excess_loss"]
        for step in (0, 8, 90)
    ]
    np.testing.assert_allclose(finding.arrays["path_law.excess_loss"], expected, rtol=1e-5)
    assert len(set(expected)) == 3
    assert finding.null["path_law.excess_loss.last.untrained"] == pytest.approx(expected[0], rel=1e-5)


def test_training_walk_goes_by_what_cannot_be_read_and_says_why_where_nothing_can(tmp_path):
    for step in (1, 2, 3):
        jw.export(step_model(step), tmp_path / f"step{step}")
    edit(tmp_path / "step2", n_head=None)
    finding = analyse(
        "training_walk", subject(tmp_path, list(series(tmp_path))), {"scalars": ("path_law.excess_loss",)}
    )
    assert finding.conventions["steps"] == [1, 3]
    assert finding.conventions["left out"] == {"steps that cannot be read": [2]}
    walked = subject(tmp_path, list(series(tmp_path)))
    edit(tmp_path / "step3", n_head=None)
    with pytest.raises(NotApplicable, match=r"\[2, 3\] cannot\. .*step2: .*n_head: expected a value"):
        analyse("training_walk", walked, {"scalars": ("path_law.excess_loss",)})


def test_the_steps_that_training_walk_looks_at():
    kept = list(PYTHIA)
    assert len(kept) == 154
    few = _chosen(kept, 8)
    assert (few[0], few[-1], len(few)) == (0, 143000, 8)
    even = np.linspace(np.log(0.5), np.log(143000), 8)[1:]
    assert np.abs(np.log(few[1:]) - even).max() <= np.log(2) / 2 + 1e-9  # kept steps are a factor of 2 apart, at most
    assert _chosen(kept, 154) == kept
    assert _chosen([5, 10, 20, 40], 3) in ([5, 10, 40], [5, 20, 40])
    assert _chosen(kept, (1000, 0, 8)) == [0, 8, 1000]
    for steps, expected in (((0, 7), r"got \[0, 7\]"), ((1,), "at least 2"), (1, "at least 2, got 1")):
        with pytest.raises(ConfigError, match=expected):
            _chosen(kept, steps)
