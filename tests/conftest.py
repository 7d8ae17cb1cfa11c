"""What all tests share: checked shapes, strict numerics, float64, and models whose parameters are all in play."""

import atexit
import os
import shutil
import tempfile

# Before jax starts. Eight host devices for the tests of meshes (everything else runs on the first, and is no slower
# for it), and quick compilation, which is most of the time tests take: a quarter less. With XLA_FLAGS set to the
# first of these alone, the laws are held by fully optimised code too. What one process compiles serves the other
# workers, and the scripts that tests start.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit it from the process that starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxwalk-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import install_import_hook

import jaxwalk.config  # it checks its values itself, and its own errors are tested

# Shapes are checked under pytest only. The numeric tower: an int is a fine float.
with install_import_hook("jaxwalk", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import jaxwalk as jw
    import jaxwalk.filters
    import jaxwalk.model
    import jaxwalk.paths
    import jaxwalk.probes
    from jaxwalk.model.layout import apart, stacked

    for _name in jw.aggregates.names():
        jw.aggregates.config_class(_name)
    for _name in jw.analyses.names():
        getattr(jw.analyses, _name)


def quick(names, cases):
    """The cases as parameters, those not among `names` for the slow tests only."""
    as_values = lambda case: case if isinstance(case, tuple) else (case,)
    return [case if case in names else pytest.param(*as_values(case), marks=pytest.mark.slow) for case in cases]


def float64():
    """A context in which arrays may be float64."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


_MAPS = Path("/proc/self/maps")
_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def compiled_programs_are_let_go():
    """Each compiled program maps about six regions of memory, and beyond 65530 of them Linux lets compilers crash."""
    yield
    if next(_tests_done) % 10 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    with float64():
        yield


@pytest.fixture
def strict_numerics():
    """No implicit broadcasting of ranks, no implicit promotion of dtypes."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def perturbed(tree, scale=0.4, seed=1):
    """`tree`, or the shapes of one, with random leaves: zero biases and unit scales would hide mistakes.

    By numpy, as compiling a fresh model's random numbers takes longer than most tests.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        mean = 1.0 if getattr(path[-1], "name", "") == "scale" else 0.0
        return rng.normal(mean, scale, a.shape).astype(a.dtype)

    separate = jax.tree_util.tree_map_with_path(leaf, apart(tree))  # so that it does not matter how layers are stacked
    return jax.tree.map(jnp.asarray, stacked(tree, separate))


def normal(seed, *shape):
    """Standard normal float32 numbers."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def to64(tree):
    """The float leaves of `tree` in float64; call it inside `float64()`."""
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


class Uniform:
    """Independent uniform tokens: a world with a larger vocabulary, and no belief states."""

    name, params = "uniform", {}

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def sample(self, key, n, length):
        return jax.random.randint(key, (n, length), 0, self.vocab_size)


@functools.cache
def model_of(scale=0.4, seed=0, **choices):
    """A small perturbed model: 5 tokens, at most 12 positions, width 16, 2 layers, unless `choices` say otherwise."""
    config = jw.ModelConfig(**{"vocab_size": 5, "max_length": 12, "width": 16, "depth": 2, **choices})
    with jax.ensure_compile_time_eval():  # a first call may be inside jit, and what is cached must be no tracer
        return perturbed(jax.eval_shape(lambda: jw.init(config, jax.random.key(0))), scale, seed)


def supported_when_untrained(analyse, world, **options):
    """The share of primary contrasts that are supported, of 20 models that have not been trained."""
    choices = {"vocab_size": world.vocab_size, "max_length": 8}
    decisions = []
    for seed in range(20):
        models = {"model": model_of(seed=seed, **choices), "untrained": model_of(seed=100 + seed, **choices)}
        finding = analyse(jw.analyses.Subject(**models, world=world, seed=seed), **options)
        decisions += [contrast.decision for contrast in finding.primary]
    return np.mean([decision == "supported" for decision in decisions])
