"""Walks on disk are the walks in memory, whatever the batches; half-written ones cannot be read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from tests.conftest import model_of
from tests.test_transformer import unchecked

PATHS = np.random.default_rng(0).integers(0, 5, (11, 7))


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_what_is_read_is_what_was_walked(batch, tmp_path):
    model = model_of(aggregate=("attention", "causal_mean"))
    store = jw.write_walks(model, PATHS, tmp_path / "new", stations=(4, 0), mixing=(1,), batch=batch)
    for read in (store, jw.read_walks(tmp_path / "new")):
        walk = jax.vmap(lambda row: model.walk(row, record_mixing=(1,)))(jnp.asarray(PATHS))
        np.testing.assert_array_equal(read.tokens, PATHS)
        np.testing.assert_allclose(read.stations, walk.stations[:, [4, 0]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(read.context, walk.context, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(read.mixing[1], walk.mixing[1], rtol=1e-5)
        assert read.station_numbers == (4, 0)
        assert isinstance(read.stations, np.memmap)
        assert not read.stations.flags.writeable


def test_only_what_is_asked_for(tmp_path):
    store = jw.write_walks(model_of(), PATHS, tmp_path, context=False, dtype=np.float16)
    assert store.context is None
    assert store.mixing == {}
    assert store.stations.shape == (11, 5, 7, 16)
    assert store.stations.dtype == np.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stations.npy", "tokens.npy", "walks.json"]


def test_bad_input(tmp_path):
    model = model_of()
    write = unchecked(lambda options: jw.write_walks(model, **{"paths": PATHS, "folder": tmp_path / "x", **options}))
    for options, message in (
        ({"paths": PATHS[0]}, r"paths: expected integers \[n, T\].*got int64 of shape \(7,\)"),
        ({"paths": PATHS + 1}, "paths: expected ids from 0 to 4, got 1 to 5"),
        ({"stations": (0, 5)}, "stations: expected numbers from 0 to 4, got 5"),
        ({"mixing": (2,)}, "mixing: expected numbers from 0 to 1, got 2"),
        ({"batch": 0}, "batch: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write(options)
    assert not (tmp_path / "x").exists()
    with pytest.raises(FileNotFoundError, match=r"expected walks\.json"):
        jw.read_walks(tmp_path)
    jw.write_walks(model, PATHS, tmp_path / "x")
    with pytest.raises(FileExistsError, match="new or empty"):
        write({})
    (tmp_path / "x" / "walks.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 1 or older, got 99"):
        jw.read_walks(tmp_path / "x")
