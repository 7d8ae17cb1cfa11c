"""The README keeps its word: its examples run, its links lead somewhere, its tables name what there is."""

import dataclasses
import functools
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxwalk as jw
from jaxwalk import training
from jaxwalk.checkpoint import read_metrics
from tests.conftest import model_of
from tests.test_training import small

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_examples_run():
    section = README.partition("## Compose it")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["log_probs"].shape == (8,)
    assert names["every_station"].shape == names["walk"].stations.shape == (5, 16, 32)
    parts, direction = names["parts"], names["direction"]
    rest = (parts.by_position.sum(0) + parts.bias) @ direction + names["constant"]
    log_p = jw.next_log_probs(names["model"], names["paths"][0])[-1, 2]
    np.testing.assert_allclose(names["shares"].sum() + rest, log_p, rtol=1e-5)
    assert names["exact"].all()
    assert 0 < float(names["visit"].value) < 1
    assert abs(float(names["change"])) > 1e-3
    assert names["influence"].shape == (8, 16, 16)
    # An untrained model knows less than the world, on average over its paths.
    assert float(np.mean(names["regret"])) > 0


def test_the_aggregate_of_the_recipe_trains_decodes_and_comes_apart(tmp_path, monkeypatch):
    (recipe,) = re.findall(r"<!-- aggregate -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "fading_mean.py").write_text(recipe)
    monkeypatch.setattr(jw.aggregates, "__path__", [*jw.aggregates.__path__, str(tmp_path)])
    config = small()
    model = dataclasses.replace(config.model, aggregate=jw.aggregates.config("fading_mean"))
    training.train(dataclasses.replace(config, model=model), tmp_path / "run", out=io.StringIO())
    losses = [row["eval_loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.01
    model, _ = jw.load(tmp_path / "run")
    assert type(model.layers[0].aggregate).__name__ == "FadingMean"
    tokens = jnp.array([0, 1, 1, 0, 1, 0])
    whole = jw.next_log_probs(model, tokens)
    state = jw.init_state(model, 6)
    for t, token in enumerate(tokens):
        state, logits = jw.step(model, state, token)
        np.testing.assert_allclose(jax.nn.log_softmax(logits), whole[t], atol=1e-5)
    documents = jw.next_log_probs(model, tokens, segments=jnp.array([1, 1, 1, 2, 2, 2]))
    np.testing.assert_allclose(documents[3:], jw.next_log_probs(model, tokens[3:]), atol=1e-5)
    assert jw.decompose(model, tokens).error < 1e-5
    assert jw.decompose_heads(model, tokens, layer=0).by_head.shape == (model.width, 6, model.width)


def test_links_and_tables():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
    for name in jw.analyses.names():
        assert f"jaxwalk/analyses/{name}.py" in README
    for name in jw.aggregates.names():
        assert name in README


def test_the_table_of_families_says_what_they_declare():
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \| (\w+) \| (\w+) \|", README, flags=re.MULTILINE)
    said = {name: facts for names, *facts in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(said) == set(jw.aggregates.names())
    for name, (granularity, kind, state) in said.items():
        config = jw.aggregates.config(name)
        init = functools.partial(config.init, width=32, max_length=16, layer=0, depth=2)
        aggregate = jax.eval_shape(lambda init=init: init(key=jax.random.key(0)))
        assert granularity.startswith(aggregate.granularity)
        assert kind == aggregate.kind
        assert (state == "grows") == (aggregate.state_size(16) > aggregate.state_size(8))


def test_the_two_lines_are_what_ci_runs():
    for mark in ("main", "tests"):
        assert re.search(rf"<!-- {mark} -->\n```bash\npython3 -m venv [^\n]+\n```\n", README), mark


def test_config_docstrings_name_their_command():
    files = sorted((ROOT / "configs").glob("*.py"))
    assert files
    assert all(f"configs/{file.name}" in file.read_text("utf-8") for file in files)


def test_the_analysis_of_the_recipe_is_found_and_decides(tmp_path, monkeypatch):
    (recipe,) = re.findall(r"<!-- analysis -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "repetition.py").write_text(recipe)
    monkeypatch.setattr(jw.analyses, "__path__", [*jw.analyses.__path__, str(tmp_path)])
    assert jw.analyses.describe("repetition").claims == ("C1",)
    world = jw.worlds.mess3(x=0.01)
    trained, untrained = model_of(vocab_size=3, max_length=16, scale=0.4), model_of(vocab_size=3, max_length=16, seed=1)
    for model in (trained, untrained):
        subject = jw.analyses.Subject(model, untrained=untrained, world=world)
        findings, skipped = jw.analyses.run(subject, ["repetition"], options={"repetition": {"paths": 64}})
        assert not skipped
        assert findings[0].primary[0].units == 64
    assert findings[0].decision == "contradicted"  # an untrained model is no nearer than itself
