"""The comparison of families: equal parameters, the numbers that it says, and a table that goes on where it stopped."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw

FILE = Path(__file__).parent.parent / "configs" / "families.py"


@pytest.fixture(scope="module")
def families():
    return runpy.run_path(str(FILE))


@pytest.mark.parametrize("family", jw.aggregates.names())
def test_every_family_fits_every_data_set_with_equal_parameters(families, family):
    for name in families["DATA"]:
        target = jw.sweep.count_parameters(families["get_config"](name).model)
        config = families["config_of"](name, family)
        assert abs(jw.sweep.count_parameters(config.model) / target - 1) < 0.01
        assert config.model.filter.hidden >= 8, "an MLP worth the name"
        assert config.data == families["get_config"](name).data
        assert config.steps == families["get_config"](name).steps


def test_what_is_measured_is_the_loss_above_the_ideal_observers(families):
    row = families["measure"]("mess3", "causal_mean", seeds=2, steps=10)
    config = families["config_of"]("mess3", "causal_mean")
    own = jw.sweep.held_out(config, families["PATHS"]).own
    world = jw.worlds.mess3()
    laws = jax.vmap(lambda path: world.next_log_probs(path[:-1])[1:])(own)
    ideal = float(jax.scipy.special.entr(jnp.exp(laws)).sum(-1).mean())  # expected, not of the tokens that came
    assert row["reference"] == pytest.approx(ideal, rel=1e-5)
    # Hardly trained it is above the ideal observer, by less than a model that says all tokens are as likely.
    assert 0 < row["mean"] < np.log(3) - ideal + 0.2
    assert row["interval"][0] <= row["mean"] <= row["interval"][1]
    assert np.mean(row["by_seed"]) == pytest.approx(row["mean"])
    assert row["state"] == 2 * 32


def test_it_goes_on_where_it_stopped(families, tmp_path, capsys):
    arguments = ["--on", "mess3", "--families", "identity", "--steps", "10", "--seeds", "2"]
    where = ["--out", str(tmp_path / "families"), "--record", str(tmp_path / "families.md")]
    assert families["main"]([*arguments, *where]) == 0
    file = tmp_path / "families" / "mess3" / "identity.json"
    row = json.loads(file.read_text())
    assert f"| identity | {row['mean']:.4f} | [{row['interval'][0]:.4f}," in (tmp_path / "families.md").read_text()
    file.write_text(json.dumps(row | {"mean": 42.0}))
    capsys.readouterr()
    assert families["main"]([*arguments, *where]) == 0
    assert json.loads(file.read_text())["mean"] == 42.0
    assert "identity" not in capsys.readouterr().out
