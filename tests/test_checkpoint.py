"""Laws of checkpoints: what is read is what was written, on any mesh, and damage is named, never swallowed."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk import checkpoint, training
from jaxwalk.checkpoint import CheckpointError, Run
from jaxwalk.config import CheckpointConfig, ConfigError, MeshConfig
from jaxwalk.filters import stream
from jaxwalk.model import unrolled
from jaxwalk.model.layout import apart, path_of, stacked, stored_paths
from tests.test_training import small

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "small"
    config = small(steps=60, checkpoint=CheckpointConfig(every=10, latest=2, best=1, log_spaced=3))
    training.train(config, workdir, out=io.StringIO())
    return workdir


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def leaves(model) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(model)]


def test_any_tree_survives_as_plain_dicts():
    model = jw.init(small().model, jax.random.key(0))
    state = training.State(model, training.optimizer(small().optim, 10).init(model))
    separate = apart(state)
    nested = checkpoint.to_dicts(separate)
    assert set(nested["model"]["layers"]) == {"0"}
    np.testing.assert_array_equal(
        nested["model"]["layers"]["0"]["filter"]["up"]["weight"], model.layers[0].filter.up.weight
    )
    again = stacked(state, checkpoint.from_dicts(separate, nested))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_layers_are_apart_on_disk_however_they_are_stacked():
    """A name for each layer's array, whatever the blocks: hybrids, remainders, unrolled."""
    aggregates = ("attention", "causal_mean", "attention", "causal_mean", "attention")
    model = jw.init(jw.ModelConfig(5, 8, width=8, depth=5, aggregate=aggregates), jax.random.key(0))
    assert len(model.layers.blocks) == 2
    names = {path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(apart(model))[0]}
    assert {f"layers/{n}/aggregate/out/weight" for n in range(5)} <= names
    for form in (model, unrolled(model)):
        assert {path for paths in stored_paths(form) for path in paths} == names
        jax.tree.map(np.testing.assert_array_equal, stacked(form, apart(model)), form)


def test_kept_steps_are_the_union_of_latest_best_and_log_spaced(run):
    kept = Run(run)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = {r["step"]: r["eval_loss"] for r in rows if "eval_loss" in r}
    assert {0, 50, 60} <= set(kept.steps)
    assert set(checkpoint.log_spaced(60, 3, 5)) <= set(kept.steps)
    best = min(losses, key=losses.__getitem__)
    assert kept.resolve("best") == best
    assert kept.resolve("latest") == 60
    assert kept.loss(best) == pytest.approx(losses[best])
    states = sorted(int(p.name) for p in (run / "checkpoints" / "state").iterdir() if p.name.isdigit())
    assert states == [50, 60]


def test_log_spaced_steps():
    steps = checkpoint.log_spaced(1000, 10, 10)
    assert steps[0] == 0
    assert steps[1] == 10
    assert steps[-1] == 1000
    assert all(s % 10 == 0 for s in steps)
    gaps = np.diff(steps[1:])
    assert (np.diff(gaps) >= 0).all()
    assert checkpoint.log_spaced(1000, 0, 10) == (0,)


def test_load_gives_the_model_and_its_vocabulary(run):
    model, vocabulary = jw.load(run)
    assert vocabulary.decode(vocabulary.encode("0 1 1")).replace(" ", "") == "011"
    untrained, _ = jw.load(run, step=0)
    fresh = jw.init(Run(run).config.model, stream(jax.random.key(0), "model"))
    for a, b in zip(leaves(untrained), leaves(fresh), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    assert any((a != b).any() for a, b in zip(leaves(model), leaves(untrained), strict=True))
    half, _ = jw.load(run, jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_a_single_step_loads_by_itself(run, tmp_path):
    alone = shutil.copytree(run / "checkpoints" / "parameters" / "60", tmp_path / "elsewhere")
    mesh = training.make_mesh(MeshConfig(data=4, model=2))
    placed, _ = jw.load(run, mesh=mesh)
    assert [a.sharding for a in jax.tree.leaves(placed)] == jax.tree.leaves(jw.sharding.shardings(placed, mesh))
    for a, b in zip(leaves(placed), leaves(jw.load(run)[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(leaves(jw.load(alone)[0]), leaves(jw.load(run)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_restores_on_another_mesh(run):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    config = training.resolve(Run(run).config)
    found = {}
    for mesh in (MeshConfig(1), MeshConfig(2, 4)):
        placed = training.make_state(config, training.optimizer(config.optim, config.steps), training.make_mesh(mesh))
        keeper = checkpoint.Checkpoints(run, config, json.loads((run / "config.json").read_text()))
        step, found[mesh.data], _ = keeper.resume(placed)
        keeper.close()
        assert step == 60
        for a, b in zip(jax.tree.leaves(found[mesh.data]), jax.tree.leaves(placed), strict=True):
            assert a.sharding == b.sharding
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[2]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def damage(folder: Path) -> None:
    """Cut the files that hold arrays in half."""
    files = [f for f in folder.rglob("d/*") if f.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_corrupted_parameters_are_named_and_the_previous_step_offered(copy):
    damage(copy / "checkpoints" / "parameters" / "60")
    with pytest.raises(CheckpointError, match=r"step 60 .*corrupted or incomplete.*previous one is step 50: --step 50"):
        jw.load(copy)
    assert leaves(jw.load(copy, step=50)[0])


def test_a_corrupted_state_is_named_and_the_previous_one_resumes(copy):
    damage(copy / "checkpoints" / "state" / "60")
    config = small(steps=60, checkpoint=CheckpointConfig(every=10, latest=2, best=1, log_spaced=3))
    with pytest.raises(CheckpointError, match=r"step 60 .*--resume 50"):
        training.train(config, copy, resume=True, out=io.StringIO())
    out = io.StringIO()
    training.train(config, copy, resume=50, out=out)
    assert "resumed from step 50; deleted the later steps 60" in out.getvalue()
    assert leaves(jw.load(copy)[0])


def test_a_half_written_step_does_not_count(copy):
    parameters = copy / "checkpoints" / "parameters"
    shutil.copytree(parameters / "60", parameters / "70.orbax-checkpoint-tmp-1")
    assert Run(copy).resolve("latest") == 60
    (parameters / "80").mkdir()
    with pytest.raises(CheckpointError, match=r"step 80 .*corrupted or incomplete.*previous one is step 60"):
        jw.load(copy)


def test_a_damaged_step_costs_what_needs_it_and_no_more(copy):
    damage(copy / "checkpoints" / "parameters" / "0")
    with pytest.raises(CheckpointError, match=r"step 0 .*next one is step 5: --step 5"):
        jw.load(copy, step=0)
    subject = jw.analyses.open_subject(copy)
    assert subject.untrained is None
    assert "step 0" in subject.missing["untrained"]
    finding = jw.analyses.analyse("training_walk", subject, {"scalars": ("path_law.excess_loss",)})
    assert finding.conventions["left out"] == {"steps that cannot be read": [0]}
    assert finding.conventions["steps"][0] == 5
    (copy / "checkpoints" / "parameters" / "60" / "definition" / "metadata").write_text("{")
    assert Run(copy).resolve("best") < 60


def test_what_is_not_there(copy, tmp_path):
    with pytest.raises(CheckpointError, match="expected a run's folder"):
        jw.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"expected one of 0, .*got 7"):
        jw.load(copy, step=7)
    definition = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**definition, "format_version": 99}))
    with pytest.raises(CheckpointError, match=r"format_version.*got 99.*upgrade"):
        jw.load(copy)
    definition["config"]["model"]["widht"] = 3
    (copy / "config.json").write_text(json.dumps(definition))
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        jw.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        jw.load(copy)
    for foreign in ("[]", '{"model_type": "gpt2"}'):
        (copy / "config.json").write_text(foreign)
        with pytest.raises(CheckpointError, match="expected the definition of a jaxwalk run"):
            jw.load(copy)


def test_only_a_run_is_deleted_and_only_for_one_that_can_be_built(copy):
    heads = jw.aggregates.config("attention", heads=3)
    bad = small(model=dataclasses.replace(small().model, aggregate=heads))
    with pytest.raises(ConfigError, match="heads: expected a divisor"):
        training.train(bad, copy, overwrite=True, out=io.StringIO())
    with pytest.raises(ConfigError, match="choose one of them"):
        training.train(small(), copy, overwrite=True, resume=True, out=io.StringIO())
    assert leaves(jw.load(copy)[0])
    (copy / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="expected the definition of a jaxwalk run"):
        training.train(small(), copy, overwrite=True, out=io.StringIO())
    assert (copy / "checkpoints").is_dir()


def test_a_finished_run_is_resumed_to_its_last_scores(copy):
    """Also where the last line of its metrics was cut short, as a full disk does."""
    config = small(steps=60, checkpoint=CheckpointConfig(every=10, latest=2, best=1, log_spaced=3))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    out = io.StringIO()
    scores = training.train(config, copy, resume=True, out=out)
    assert "is finished" in out.getvalue()
    assert scores.keys() == {"eval_loss", "excess_loss"}
    rows = checkpoint.read_metrics(copy / "metrics.jsonl")
    assert {name: rows[-1][name] for name in scores} == scores
    assert '"lo\n' not in (copy / "metrics.jsonl").read_text()


def test_checkpoints_of_every_format_version_load_for_ever():
    """A tiny step of each version is committed, with the log-probabilities that it gave when it was written."""
    versions = sorted(DATA.glob("format_v*"))
    assert [v.name for v in versions] == [f"format_v{n + 1}" for n in range(checkpoint.FORMAT_VERSION)]
    for folder in versions:
        model, vocabulary = jw.load(folder)
        expected = json.loads((folder / "expected.json").read_text())
        tokens = vocabulary.encode(expected["text"])
        np.testing.assert_allclose(jw.next_log_probs(model, tokens), expected["next_log_probs"], atol=1e-5)


def test_resuming_with_a_config_that_changes_only_reports(copy):
    config = small(steps=60, checkpoint=CheckpointConfig(every=10, latest=1), log_every=20, eval_batches=1)
    training.train(dataclasses.replace(config, name="other"), copy, resume=True, out=io.StringIO())
    assert Run(copy).config.log_every == 20
