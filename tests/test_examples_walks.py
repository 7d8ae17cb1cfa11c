"""The examples on beliefs, decompositions and steering run, and what they print obeys the laws that they show."""

import ast
import dataclasses
import itertools
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import Subject, open_subject
from jaxwalk.config import CheckpointConfig, MLPConfig, OptimConfig, TrainConfig, WorldData

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("belief_fractal", "decompose_prediction", "steer_walk")
NUMBER = r"[+-]?\d+\.\d+"


@pytest.fixture(autouse=True)
def float32_afterwards():
    """One of the scripts turns float64 on for its process, which here is that of all tests."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: a small model that has learned Mess3 for a few seconds, and its step 0."""
    folder = tmp_path_factory.mktemp("runs") / "mess3"
    config = TrainConfig(
        name="mess3",
        data=WorldData("mess3"),
        model=jw.ModelConfig(vocab_size=3, max_length=11, width=32, depth=1, filter=MLPConfig(hidden=64)),
        optim=OptimConfig(lr=5e-3, warmup=10, weight_decay=0.01, final_lr=0.1),
        checkpoint=CheckpointConfig(every=120, log_spaced=0),
        batch_size=64,
        steps=120,
        log_every=120,
        eval_every=120,
        eval_batches=1,
    )
    jw.training.train(config, folder)
    return folder


def script(name, **constants):
    """The names of an example, with some of its constants replaced."""
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    names["main"].__globals__.update(constants)
    return names


def numbers(line):
    """The decimal numbers in a line."""
    return [float(x) for x in re.findall(NUMBER, line)]


def test_belief_fractal_shows_what_training_adds_and_draws_it(run, tmp_path, capsys):
    file = tmp_path / "new" / "picture.png"
    script("belief_fractal")["main"]([str(run), "--out", str(file)])
    printed = capsys.readouterr().out
    r2 = {name: float(value) for name, value in re.findall(rf"^  ([a-z ]+?) +({NUMBER})$", printed, re.MULTILINE)}
    assert list(r2) == ["trained", "untrained", "last token", "next law"]
    assert r2["untrained"] < r2["trained"] < 1
    assert r2["last token"] < r2["trained"]
    gained = (r2["trained"] - r2["untrained"]) / (1 - r2["untrained"])
    assert float(re.search(rf"closed ({NUMBER})%", printed)[1]) == pytest.approx(100 * gained, abs=0.1)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"picture: {file}" in printed


def test_belief_fractal_says_what_a_picture_takes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = script("belief_fractal")["draw"]({"one": np.eye(3)}, tmp_path / "x.png")
    assert "jaxwalk[report]" in said
    assert not list(tmp_path.iterdir())


def test_beliefs_are_read_by_a_map_that_was_fitted_to_other_folds():
    read_off = script("belief_fractal")["read_off"]
    rng = np.random.default_rng(0)
    features, folds = rng.normal(size=(200, 5)), rng.integers(0, 4, 200)
    beliefs = features @ rng.normal(size=(5, 3)) + rng.normal(size=3)
    np.testing.assert_allclose(read_off(features, beliefs, folds), beliefs, atol=1e-10)
    # What a fold's own beliefs are is nothing to the map that reads it, and something to the maps of the others.
    noisy = beliefs + rng.normal(size=beliefs.shape)
    other = noisy.copy()
    other[folds == 1] += 5
    before, after = read_off(features, noisy, folds), read_off(features, other, folds)
    np.testing.assert_array_equal(before[folds == 1], after[folds == 1])
    assert (np.abs(before - after)[folds != 1].max(axis=1) > 0.1).all()


@pytest.mark.slow
def test_decompose_prediction_prints_parts_that_sum_and_cuts_that_agree(run, capsys):
    script("decompose_prediction", LENGTH=4, PATHS=4)["main"]([str(run)])
    printed = capsys.readouterr().out
    log_p = float(re.search(rf"= ({NUMBER}) nats", printed)[1])
    held, direct = (next(line for line in printed.splitlines() if line.startswith(w)) for w in ("held:", "direct"))
    for line in (held, direct):
        *parts, total = numbers(line)
        assert total == pytest.approx(log_p, abs=2e-6)
        assert sum(parts) == pytest.approx(log_p, abs=5e-4)
    by_token = [numbers(line) for line in re.findall(r"^ +\d+ [ABC] .*$", printed, re.MULTILINE)]
    assert np.shape(by_token) == (4, 5)
    for answers, sums in zip(
        np.transpose(by_token)[:4], numbers(re.search(r"^sum .*$", printed, re.M)[0]), strict=True
    ):
        assert sum(answers) == pytest.approx(sums, abs=5e-4)
    errors = re.findall(r"\d+e[+-]\d+", "".join(re.findall(r"^(?:relative errors|steps x tokens).*$", printed, re.M)))
    assert len(errors) == 3 + 1 + 3  # three cuts, one layer of heads; how far three pairs of cuts are apart
    assert all(float(error) <= 1e-12 for error in errors)
    gaps = [abs(float(gap)) for gap in re.search(r"^gap (.*)$", printed, re.M)[1].split()]
    assert gaps[0] < 1e-12
    assert gaps[2] < 1e-6
    assert max(gaps[1], gaps[3]) > 1e-6
    trained, untrained = (numbers(re.search(rf"^{of} .*$", printed, re.M)[0]) for of in ("trained", "untrained"))
    assert trained[3] > 0.5
    assert abs(untrained[3]) < trained[3]


def test_what_a_hidden_token_tells_in_a_world_is_counted_by_enumeration(x64):
    world = jw.worlds.mess3(x=0.2, a=0.7)
    hidden = script("decompose_prediction")["hidden"]
    T = 4
    joint = np.zeros((3,) * T)
    for path in itertools.product(range(3), repeat=T):
        joint[path] = np.exp(float(world.path_log_prob(np.array(path))))
    path = (2, 0, 0, 1)
    known = joint[path] / joint[path[:-1]].sum()
    expected = []
    for j in range(T - 1):
        unknown = joint[tuple(slice(None) if i == j else v for i, v in enumerate(path[:-1]))].sum(0)
        expected.append(np.log(known) - np.log(unknown[path[-1]] / unknown.sum()))
    np.testing.assert_allclose(hidden(world, jnp.array(path)), expected, rtol=1e-9)


@pytest.mark.slow
def test_steer_walk_steers_more_than_chance_and_its_tables_obey_the_laws(run, capsys):
    script("steer_walk", STEPS=2, STRENGTHS=(-0.05, 0.05), CONTEXTS=4, DIRECTIONS=4)["main"]([str(run)])
    printed = capsys.readouterr().out
    here, there = numbers(next(line for line in printed.splitlines() if line.startswith("P(the walk visits A")))
    rows = [line for line in printed.splitlines() if re.match(rf" +\d +{NUMBER} +{NUMBER} ", line)]
    assert len(rows) == 3 + 2
    columns = ("strength", "length", "steered", "random", "spread", "first")
    table = [dict(zip(columns, numbers(line), strict=True)) for line in rows]
    assert here < there
    # At the last stations everything that was read is in the station that is pushed.
    for row in table[1:3]:
        assert here + 0.1 < row["steered"]
        assert row["random"] + 2 * row["spread"] < row["steered"]
    # The derivative is that of small pushes: its error is of third order in a difference to both sides.
    minus, plus = table[3:]
    assert plus["first"] - minus["first"] > 0.003
    assert plus["steered"] - minus["steered"] == pytest.approx(plus["first"] - minus["first"], rel=0.1, abs=3e-4)
    assert numbers(printed.split("\nSeen")[1]) == []

    pushed, patched = printed.split("\nlog P(")[1:]
    for sweep in (pushed, patched):
        lines = sweep.splitlines()
        path, lent = lines[1].split(), lines[2].split()
        effects = np.array([numbers(line) for line in lines[3:6]])
        assert effects.shape == (3, 9)
        # The last stations of earlier positions are on no way to what is scored.
        assert not effects[-1, :7].any()
        assert effects[-1, 7] > 0.2
    # A token that the paths share has one vector: there is nothing to put in its place.
    assert not effects[0, [one == other for one, other in zip(path, lent, strict=True)]].any()


def test_the_readme_names_how_each_is_run():
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(f"python examples/{name}.py" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_does_not_fit_is_refused_with_what_does(name, run, capsys):
    subject = open_subject(run)
    text_model = Subject(model=subject.model, untrained=subject.untrained)
    with pytest.raises(SystemExit):
        script(name, open_subject=lambda folder: text_model)["main"]([str(run)])
    assert "run: expected one" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_run_a_model_is_trained_in_memory(run, tmp_path, monkeypatch, capsys):
    files = [ast.parse((EXAMPLES / f"{name}.py").read_text("utf-8")) for name in NAMES]
    copies = {ast.dump(node) for file in files for node in file.body if getattr(node, "name", "") == "trained"}
    assert len(copies) == 1
    small = lambda name, model, *rest, **options: dataclasses.replace(
        TrainConfig(name, model, *rest, **options), model=dataclasses.replace(model, depth=1, width=16), eval_batches=1
    )
    subject = script("belief_fractal", TrainConfig=small)["trained"](steps=10)
    paths = subject.paths(64)
    loss = jax.jit(lambda model: -jax.vmap(jw.path_log_prob, (None, 0))(model, paths).mean())
    assert loss(subject.model) < loss(subject.untrained)
    assert "10/10" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path)  # where there are no runs
    script("belief_fractal", trained=lambda: open_subject(run))["main"]([])
    assert (tmp_path / "runs" / "examples" / "belief_fractal.png").exists()
