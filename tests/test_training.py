"""Laws of training: what is optimised, that meshes and stops change nothing, and that nothing is lost."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxwalk as jw
from jaxwalk import training
from jaxwalk.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    MLPConfig,
    OptimConfig,
    TextData,
    TrainConfig,
    WorldData,
    to_dict,
)
from jaxwalk.model.layout import apart, path_of
from tests.conftest import quick

ROOT = Path(__file__).parent.parent


def small(**changes) -> TrainConfig:
    config = TrainConfig(
        name="small",
        data=WorldData("golden_mean", {}),
        model=jw.ModelConfig(
            vocab_size=2,
            max_length=8,
            width=16,
            depth=1,
            # No key bias: its true gradient is 0, and AdamW makes whole steps of what rounding leaves of it.
            aggregate=jw.aggregates.config("attention", heads=2, bias=False),
            filter=MLPConfig(hidden=32),
        ),
        optim=OptimConfig(lr=1e-2, warmup=5),
        checkpoint=CheckpointConfig(every=10, log_spaced=3),
        mesh=MeshConfig(data=1),
        batch_size=16,
        steps=20,
        steps_per_call=5,
        log_every=10,
        eval_every=10,
        eval_batches=2,
    )
    return dataclasses.replace(config, **changes)


def parameters_after(config: TrainConfig, calls: int = 2) -> tuple[list, np.ndarray]:
    """Parameters and losses after some calls, without the loop."""
    config = training.resolve(config)
    mesh = training.make_mesh(config.mesh)
    batches = training.make_batches(config)
    update = training.optimizer(config.optim, config.steps)
    state = training.make_state(config, update, mesh)
    call = training.make_call(config, batches, update, mesh, state)
    leaves, losses = jax.tree.leaves(state), []
    n_parameters = len(jax.tree.leaves(state.model))
    for i in range(calls):
        inputs = batches.inputs(i * config.steps_per_call, config.steps_per_call)
        leaves, metrics = call(leaves, inputs)
        losses.append(np.asarray(metrics["loss"]))
    return [np.asarray(a) for a in leaves[:n_parameters]], np.concatenate(losses)


def test_loss_is_minus_path_log_prob_per_predicted_token():
    config = small()
    model = jw.init(config.model, jax.random.key(0))
    tokens = jw.worlds.golden_mean().sample(jax.random.key(1), 6, 9)
    batch_loss, log_prob = jax.jit(training.batch_loss), jax.jit(jw.path_log_prob)
    total, count = batch_loss(model, tokens)
    separate = sum(float(log_prob(model, row)) for row in tokens)
    assert int(count) == 6 * 8
    np.testing.assert_allclose(total, -separate, rtol=1e-5)

    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]] * 6)
    total, count = batch_loss(model, tokens, segments)
    separate = sum(float(log_prob(model, r[:3]) + log_prob(model, r[3:7])) for r in tokens)
    assert int(count) == 6 * 5
    np.testing.assert_allclose(total, -separate, rtol=1e-5)


def test_gradient_accumulation_changes_nothing():
    whole, losses = parameters_after(small())
    parts, losses_in_parts = parameters_after(small(accumulate=4))
    np.testing.assert_allclose(losses_in_parts, losses, rtol=1e-5)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_steps_per_call_changes_nothing():
    together, losses = parameters_after(small(), calls=2)
    apart, losses_apart = parameters_after(small(steps_per_call=1), calls=10)
    np.testing.assert_allclose(losses, losses_apart, rtol=1e-5)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("mesh", quick([MeshConfig(4, 2)], [MeshConfig(8, 1), MeshConfig(4, 2), MeshConfig(1, 8)]))
def test_one_device_and_eight_agree(mesh):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    one, losses = parameters_after(small())
    eight, losses_on_eight = parameters_after(small(mesh=mesh))
    np.testing.assert_allclose(losses_on_eight, losses, rtol=1e-5)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_parameters_are_sharded_by_their_paths():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = training.make_mesh(MeshConfig(4, 2))
    config = small()
    update = training.optimizer(config.optim, config.steps)
    state = training.make_state(config, update, mesh)
    layer = state.model.layers.blocks[0].period[0]
    assert layer.filter.up.weight.sharding.spec == jax.sharding.PartitionSpec(None, None, "model")
    assert layer.filter.down.weight.addressable_shards[0].data.shape[1:] == (16, 16)
    assert layer.aggregate_norm.scale.sharding.is_fully_replicated
    moments = [a for a in jax.tree.leaves(state.optimizer) if a.shape == layer.filter.up.weight.shape]
    assert moments
    assert all(a.sharding.spec == layer.filter.up.weight.sharding.spec for a in moments)


def compiled(config: TrainConfig, mesh: Mesh) -> str:
    batches = training.make_batches(config)
    update = training.optimizer(config.optim, config.steps)
    state = training.make_state(config, update, mesh)
    call = training.make_call(config, batches, update, mesh, state)
    return call.lower(jax.tree.leaves(state), batches.inputs(0, 1)).compile().as_text()


@pytest.mark.parametrize("kernel", ["plain", "xla"])
def test_data_parallel_step_gathers_no_batch(kernel):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    config = small(steps_per_call=1)
    attention = jw.aggregates.config("attention", heads=2, kernel=kernel)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, aggregate=attention))
    hlo = compiled(training.resolve(config), training.make_mesh(MeshConfig(8, 1)))
    assert re.search(r"all-reduce", hlo), "gradients are reduced over the data axis"
    gathers = re.findall(r"\S+ = (\S+) all-gather", hlo)
    # Token ids of a sampled batch may move; activations (anything of the model's width) may not.
    assert not [g for g in gathers if g.startswith(("f32", "bf16"))], gathers


def test_batches_are_a_function_of_seed_and_step():
    batches = training.make_batches(small())
    again = training.make_batches(small())
    other = training.make_batches(small(seed=1))
    rows = [np.asarray(b.batch(jnp.array(3))[0]) for b in (batches, again, other)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()
    assert (rows[0] != np.asarray(batches.batch(jnp.array(4))[0])).any()


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_schedules(name):
    config = OptimConfig(lr=2.0, schedule=name, warmup=10, final_lr=0.1, decay_share=0.2)
    rates = np.array([float(training.schedule(config, 100)(i)) for i in range(101)])
    np.testing.assert_allclose(rates[:11], 2.0 * np.arange(11) / 10, atol=1e-6)
    assert rates.max() == pytest.approx(2.0)
    if name == "constant":
        assert (rates[10:] == 2.0).all()
    else:
        assert (np.diff(rates[10:]) <= 1e-6).all()
        assert rates[100] == pytest.approx(0.2)
    if name == "wsd":
        assert (rates[10:80] == 2.0).all()


def test_weight_decay_acts_on_what_each_module_declares():
    """Matrices; no vectors, stacked or not, and no rates, shares or direct terms, whatever their shape."""
    config = OptimConfig(lr=1.0, warmup=0, schedule="constant", weight_decay=0.5, clip=None)
    update = training.optimizer(config, 10)
    layers = ("attention", "mamba", "s4d", "rwkv4", "rwkv4_channel_mix", "rwkv7", "hyena", "gmlp", "gru")
    model = jw.init(jw.ModelConfig(5, 8, width=8, depth=18, aggregate=layers, tied=True), jax.random.key(0))
    assert [block.repeats for block in model.layers.blocks] == [2]
    model = jax.tree.map(jnp.ones_like, model)
    changes, _ = jax.jit(update.update)(jax.tree.map(jnp.zeros_like, model), update.init(model), model)
    spared = {"A_log", "log_neg_re", "im", "shares", "direct", "scale", "bias", "skip", "log_dt", "bonus", "removal"}
    decayed = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(apart(changes))[0]:
        matrix = leaf.ndim >= 2 and keys[-1].name not in spared
        np.testing.assert_allclose(leaf, -0.5 if matrix else 0, err_msg=path_of(keys))
        decayed |= {path_of(keys)} if matrix else set()
    assert {"embed/table", "positions/table", "layers/0/aggregate/qkv/weight", "layers/2/aggregate/C_re"} <= decayed


def test_excess_loss_is_the_expected_divergence_from_the_world():
    config = training.resolve(small(eval_batches=1, batch_size=512))
    mesh = training.make_mesh(config.mesh)
    batches = training.make_batches(config)
    model = jw.init(config.model, jax.random.key(3))
    evaluate = training.make_evaluation(config, batches, mesh, jax.tree.structure(model))
    scores = evaluate(jax.tree.leaves(model))

    tokens = np.asarray(batches.evaluation(1)[0][0])
    world = batches.world
    kl = []
    for row in tokens[:32]:
        exact = np.exp(np.asarray(world.next_log_probs(row), float))[1:-1]
        model_law = np.asarray(jw.next_log_probs(model, row[:-1]), float)
        kl.append([(p[p > 0] * (np.log(p[p > 0]) - q[p > 0])).sum() for p, q in zip(exact, model_law, strict=True)])
    part = training.make_evaluation(
        config, dataclasses.replace(batches, batch_size=32), mesh, jax.tree.structure(model)
    )
    assert scores["excess_loss"] > 0
    # The mean over 512 paths and that over 32 of them differ by sampling; both are the same quantity.
    assert np.mean(kl) == pytest.approx(scores["excess_loss"], rel=0.2)
    assert part(jax.tree.leaves(model))["excess_loss"] == pytest.approx(scores["excess_loss"], rel=0.2)
    ideal = -np.mean([float(world.path_log_prob(row, given=1)) for row in tokens[:128]]) / config.model.max_length
    assert scores["eval_loss"] - scores["excess_loss"] == pytest.approx(ideal, abs=0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished small run: its folder, and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "small"
    out = io.StringIO()
    scores = training.train(small(sample_every=10), workdir, out=out)
    return workdir, out.getvalue(), scores


def test_a_run_learns_and_leaves_its_records(finished):
    workdir, printed, scores = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [r for r in rows if "eval_loss" in r]
    assert evaluations[0]["step"] == 0
    assert evaluations[-1]["step"] == 20
    assert scores["excess_loss"] == evaluations[-1]["excess_loss"]
    assert 0 <= evaluations[-1]["excess_loss"] < evaluations[0]["excess_loss"]
    trained = [r for r in rows if "lr" in r]
    assert [r["step"] for r in trained] == [10, 20]
    assert all(r["tokens_per_second"] > 0 and np.isfinite(r["grad_norm"]) for r in trained)
    assert "nats above the ideal observer" in printed
    assert "sample:" in printed
    assert "attention kernel plain" in printed
    assert "python analyze.py" in printed
    assert json.loads((workdir / "config.json").read_text())["config"]["model"]["width"] == 16


def test_a_finished_run_is_not_run_over(finished):
    workdir, _, _ = finished
    with pytest.raises(ConfigError, match=r"already holds this run.*--resume.*--overwrite"):
        training.train(small(sample_every=10), workdir, out=io.StringIO())
    changed = small(optim=OptimConfig(lr=1e-3, warmup=5))
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"another config's run.*optim\.lr"):
            training.train(changed, workdir, resume=resume, out=io.StringIO())
    assert (workdir / "metrics.jsonl").exists()


def test_a_run_that_was_killed_before_its_first_state_or_lost_its_config_resumes(finished, tmp_path):
    workdir, _, scores = finished
    config = small(sample_every=10)
    tmp_path /= "run"
    tmp_path.mkdir()
    (tmp_path / "config.json.tmp").write_text('{"format')  # killed while it was written
    shutil.copy(workdir / "config.json", tmp_path / "config.json")
    assert training.train(config, tmp_path, resume=True, out=io.StringIO()) == scores
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in workdir.iterdir()}
    before = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 20, "los\xff\xfe\n')
    assert training.train(config, tmp_path, resume=True, out=io.StringIO()) == scores
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(before)


def test_resuming_a_run_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="expected a run to resume"):
        training.train(small(), tmp_path / "none", resume=True, out=io.StringIO())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="got other files"):
        training.train(small(), tmp_path, overwrite=True, out=io.StringIO())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_vocabulary_of_another_size_is_refused():
    config = small(model=dataclasses.replace(small().model, vocab_size=3))
    with pytest.raises(ConfigError, match="expected the size of the data's vocabulary, 2, got 3"):
        training.make_batches(config)


def test_a_batch_that_does_not_fit_the_mesh_is_refused(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    with pytest.raises(ConfigError, match="multiple of the 8 ways"):
        training.train(small(mesh=MeshConfig(8), batch_size=12), tmp_path / "run", out=io.StringIO())
    with pytest.raises(ConfigError, match="mesh: expected"):
        training.make_mesh(MeshConfig(64, 64))


def test_divergence_stops_at_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    config = small(optim=OptimConfig(lr=1e30, warmup=0, schedule="constant", clip=None, weight_decay=0.0))
    with pytest.raises(training.TrainingDiverged, match=r"at step \d+.*last good checkpoint is step 0"):
        training.train(config, tmp_path / "run", out=io.StringIO())
    model, _ = jw.load(tmp_path / "run")
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(model))


def test_a_model_that_is_not_finite_on_held_out_paths_is_not_saved(tmp_path):
    """The loss of the first step is finite, and what it makes of the parameters is not."""
    config = small(
        optim=OptimConfig(lr=1e30, warmup=0), steps=2, steps_per_call=1, log_every=1, eval_every=1,
        checkpoint=CheckpointConfig(every=1),
    )  # fmt: skip
    with pytest.raises(training.TrainingDiverged, match=r"at step 1 is nan on held-out paths.*checkpoint is step 0"):
        training.train(config, tmp_path / "run", out=io.StringIO())
    assert jw.checkpoint.Run(tmp_path / "run").steps == (0,)


def test_cudnn_is_refused_where_there_is_none(tmp_path):
    aggregate = jw.aggregates.config("attention", heads=2, kernel="cudnn")
    with pytest.raises(ConfigError, match="kernel: expected 'plain' or 'xla' on cpu"):
        training.train(small(model=dataclasses.replace(small().model, aggregate=aggregate)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_on_text_is_analysed_on_its_own_text(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat. " * 400)
    config = small(
        data=TextData(corpus=str(corpus), store=str(tmp_path / "stores")),
        model=jw.ModelConfig(vocab_size=257, max_length=16, width=16, depth=1),
    )
    training.train(config, tmp_path / "run", out=io.StringIO())
    corpus.write_text("something else altogether, " * 400)
    subject = jw.analyses.open_subject(tmp_path / "run")
    assert "cat" in subject.vocabulary.decode(np.asarray(subject.store.train.tokens[:40]))
    with pytest.raises(ConfigError, match="differ in corpus"):
        training.train(config, tmp_path / "run", resume=True, out=io.StringIO())
    shutil.rmtree(tmp_path / "stores")
    subject = jw.analyses.open_subject(tmp_path / "run")
    assert subject.store is None
    with pytest.raises(jw.analyses.NotApplicable, match="no longer what the run was trained on"):
        jw.analyses.analyse("path_law", subject)
    corpus.unlink()
    assert "corpus" in jw.analyses.open_subject(tmp_path / "run").missing["store"]


def test_bfloat16_trains_float32_parameters(tmp_path):
    scores = training.train(small(compute_dtype="bfloat16"), tmp_path / "run", out=io.StringIO())
    model, _ = jw.load(tmp_path / "run")
    assert {a.dtype for a in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert np.isfinite(scores["eval_loss"])
    assert scores["excess_loss"] < 0.2


def test_text_trains_below_the_uniform_loss(tmp_path):
    config = small(
        data=TextData(store=str(tmp_path / "stores")),
        model=jw.ModelConfig(vocab_size=257, max_length=16, width=16, depth=1),
        sample_every=10,
    )
    out = io.StringIO()
    scores = training.train(config, tmp_path / "run", out=out)
    assert scores["eval_loss"] < np.log(257)
    per_byte = scores["bits_per_byte"] / (scores["eval_loss"] / np.log(2))
    assert 0.99 < per_byte < 1.01, "bytes are tokens, but for one begin-of-path token a document"
    model, vocabulary = jw.load(tmp_path / "run")
    assert vocabulary.decode(vocabulary.encode("naïve")) == "naïve"
    assert model.vocab_size == vocabulary.size


# A stop and a resumption, in a second process, as a user meets them.

CONFIG = """
import jaxwalk as jw
from jaxwalk.config import *


def get_config():
    return TrainConfig(
        name="small", data=WorldData("golden_mean", {}), mesh=MeshConfig(data=1), batch_size=16,
        model=jw.ModelConfig(vocab_size=2, max_length=8, width=16, depth=1, filter=MLPConfig(hidden=32)),
        steps=4000, steps_per_call=20, log_every=20, eval_every=4000, eval_batches=1,
        checkpoint=CheckpointConfig(every=20, latest=2, log_spaced=3),
    )
"""


def launch(tmp_path: Path, name: str, *options: str) -> subprocess.Popen:
    (tmp_path / "config.py").write_text(CONFIG)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "config.py"), "--workdir", str(tmp_path / name)]
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
    )


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Read the process's lines until it is past a step."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        found = re.match(r"step +(\d+)/", line)
        if found and int(found.group(1)) >= step:
            return
    raise AssertionError("it ended early: " + "".join(lines))


def leaves_of(workdir: Path, step: int) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(jw.load(workdir, step=step)[0])]


STEPS = ("--steps", "400")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[np.ndarray]:
    """The parameters of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    process = launch(folder, "run", *STEPS)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    return leaves_of(folder / "run", 400)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, whole, how):
    stopped = launch(tmp_path, "stopped", *STEPS)
    wait_for_step(stopped, 60)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=rf"process {stopped.pid} on .* is training in this folder"):
            training.train(small(steps=400), tmp_path / "stopped", out=io.StringIO(), **options)
    stopped.send_signal(how)
    printed = stopped.stdout.read()
    status = stopped.wait(timeout=60)
    if how == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 75, printed  # stopped, and can be resumed
        assert "--resume" in printed
    saved = max(int(p.name) for p in (tmp_path / "stopped" / "checkpoints" / "state").iterdir() if p.name.isdigit())
    assert 0 < saved < 400, "it was stopped on its way"

    resumed = launch(tmp_path, "stopped", *STEPS, "--resume")
    printed = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, printed
    assert re.search(r"resumed from step \d+", printed)
    for a, b in zip(whole, leaves_of(tmp_path / "stopped", 400), strict=True):
        np.testing.assert_array_equal(a, b)
    steps_logged = [
        r["step"]
        for r in map(json.loads, (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines())
        if "lr" in r
    ]
    assert steps_logged == sorted(set(steps_logged)), "no step is logged twice"


def test_config_files_and_flags(tmp_path):
    bad = {
        ("--modle.depth", "3"): "model.depth",
        ("--optim.lr", "fast"): "could not convert",
        ("--steps", "7"): "multiple",
        ("--data.world", "golden_mena"): "Did you mean 'golden_mean'",
        ("--model.aggregate", "causal_maen"): "Did you mean 'causal_mean'",
    }
    for options, message in bad.items():
        process = launch(tmp_path, "bad", *options)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode != 0
        assert message in printed
        assert "Traceback" not in printed
        assert not (tmp_path / "bad").exists()


def test_every_config_file_is_what_its_run_needs():
    import importlib.util

    files = sorted((ROOT / "configs").glob("*.py"))
    assert files
    for file in files:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
        assert config.name == file.stem
        assert f"python train.py configs/{file.name}" in module.__doc__
        shapes = jax.eval_shape(lambda config=config: jw.init(config.model, jax.random.key(0)))
        assert jax.tree.leaves(shapes)
        assert json.dumps(to_dict(training.resolve(config)))
