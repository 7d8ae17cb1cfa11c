"""Releases of jax that compute wrong numbers are refused, and the one installed computes right ones."""

import importlib.metadata
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.requirements import Requirement

from jaxwalk._versions import FAULTY, refuse_faulty_jax
from tests.conftest import float64


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0"])
@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_faulty_releases_are_refused_with_the_remedy(monkeypatch, package, version):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda p: version if p == package else real(p))
    with pytest.raises(ImportError, match=rf"{package} {version} .*pip install 'jax!=0.10.2,!=0.11.0'"):
        refuse_faulty_jax()


def test_good_and_missing_releases_are_not(monkeypatch):
    assert refuse_faulty_jax() is None

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert refuse_faulty_jax() is None  # importing jax itself will say what is missing


def test_the_package_excludes_the_same_releases():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for package in ("jax", "jaxlib"):
        assert not any(asked[package].contains(version) for version in FAULTY)
        assert all(asked[package].contains(version) for version in ("0.10.1", "0.11.1", "0.12.0"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 1000, 16_385, 32_769])
def test_matrix_vector_products_under_vmap_are_right(n, dtype):
    # jax issue 39103. With jaxlib 0.10.2 the last rows are wrong (float64 from 16,385 rows on, float32 from 32,769).
    rng = np.random.default_rng(0)
    x, matrix = rng.integers(-8, 9, (n, 3)).astype(dtype), rng.integers(-4, 5, (3, 3)).astype(dtype)
    with float64():
        y = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.asarray(matrix) @ row) ** 2)))(x)
    np.testing.assert_array_equal(y, ((x @ matrix.T) ** 2).sum(1))  # small integers: exact in any order
