"""The shape of walks, the nearness of vectors, and the beliefs in them: by hand, by planted truth, by identities."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import Finding, NotApplicable, Subject, belief_geometry, encoding_walk, proximity
from jaxwalk.filters import Linear
from jaxwalk.paths import next_log_probs
from tests.conftest import model_of, quick, to64

MESS3 = jw.worlds.make("mess3")


class Uniform:
    """Independent uniform tokens: a world with a larger vocabulary, and no belief states."""

    name, params = "uniform", {}

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def sample(self, key, n, length):
        return jax.random.randint(key, (n, length), 0, self.vocab_size)


def subject_of(world=MESS3, *, untrained=True, **choices):
    choices = {"vocab_size": world.vocab_size, "max_length": 8, **choices}
    null = model_of(0.2, seed=7, **choices) if untrained else None
    return Subject(model=model_of(**choices), untrained=null, world=world)


def holds(finding, *measured):
    """What every finding promises."""
    assert isinstance(finding, Finding)
    json.dumps(finding.to_dict(), allow_nan=False)
    assert set(measured) <= set(finding.measured)
    assert all(np.isfinite(v) for v in finding.measured.values())
    assert all(np.isfinite(v) for v in finding.null.values())
    for name, (low, high) in finding.interval.items():
        assert low <= finding.measured[name] + 1e-9, name
        assert finding.measured[name] <= high + 1e-9, name
    assert finding.summary.endswith(".")
    assert "nan" not in finding.summary


# The encoding walk.


def test_geometry_by_hand():
    walk = jnp.array([[0.0, 0], [3, 0], [3, 4], [3, 0], [3, 0], [4, 0]])
    np.testing.assert_allclose(encoding_walk.norms(walk), [0, 3, 5, 3, 3, 4])
    assert encoding_walk.length(walk) == 12
    assert encoding_walk.displacement(walk) == 4
    np.testing.assert_allclose(encoding_walk.straightness(walk), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(encoding_walk.turn_angles(walk), [np.pi / 2, np.pi, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_allclose(encoding_walk.stationwise_cosine(walk), [np.nan, 0.6, 0.6, 1, 1], rtol=1e-6)


def test_a_straight_walk_and_one_that_stands_still():
    line = jnp.arange(5.0)[:, None] * jnp.array([1.0, 2, 3])
    np.testing.assert_allclose(encoding_walk.straightness(line), 1, rtol=1e-6)
    np.testing.assert_allclose(encoding_walk.turn_angles(line), 0, atol=1e-6)
    still = jnp.ones((4, 3))
    assert np.isnan(encoding_walk.straightness(still))
    assert np.isnan(encoding_walk.turn_angles(still)).all()


def test_small_turns_are_not_lost_to_rounding():
    small = 1e-5
    walk = jnp.array([[0.0, 0], [1, 0], [2, small]])
    np.testing.assert_allclose(encoding_walk.turn_angles(walk), [small], rtol=1e-3)


def test_the_random_walk_keeps_start_and_step_lengths_and_turns_by_a_right_angle():
    walk = jnp.cumsum(jnp.asarray(np.random.default_rng(0).normal(size=(40, 256)), jnp.float32), axis=0)
    null = encoding_walk.random_walk(walk, jax.random.key(0))
    np.testing.assert_array_equal(null[0], walk[0])
    steps = [np.linalg.norm(np.diff(w, axis=0), axis=-1) for w in (null, walk)]
    np.testing.assert_allclose(*steps, rtol=1e-4)
    assert abs(float(encoding_walk.turn_angles(null).mean()) - np.pi / 2) < 0.05
    assert abs(float(encoding_walk.straightness(null)) * np.sqrt(39) - 1) < 0.3


def test_encoding_walk():
    finding = encoding_walk.analyse(subject_of(), paths=40)
    holds(
        finding,
        "straightness",
        "turn_angle",
        "length",
        "displacement",
        "lens_kl",
        "cosine",
        "length_position_0",
        "fisher_length",
    )
    assert finding.null["lens_kl.last_station"] == 0
    assert finding.arrays["lens_kl"][-1] == 0
    assert {f"{n}.untrained" for n in finding.measured} <= set(finding.null)
    assert finding.null["turn_angle.random_walk"] == pytest.approx(np.pi / 2, abs=0.1)
    assert [f.name for f in finding.figures] == ["lens_kl_by_station", "turn_angle_by_station", "norms_by_station"]


def test_conventions_of_the_walk_change_its_stations():
    subject = subject_of(untrained=False)
    walks = jax.vmap(lambda path: subject.model.walk(path).stations)(subject.paths(16))  # [16, 5, 8, 16]
    blocks = np.asarray(walks)[:, ::2, 1:]
    expected = np.linalg.norm(np.diff(blocks, axis=1), axis=-1).sum(1).mean()
    finding = encoding_walk.analyse(subject, paths=16, stations="blocks")
    holds(finding)
    assert finding.measured["length"] == pytest.approx(expected, rel=1e-4)
    assert "untrained" in finding.conventions
    short = encoding_walk.analyse(subject, paths=16, stations="blocks", embedding=False, normalised=True)
    holds(short)
    assert "turn_angle" not in short.measured
    assert short.measured["straightness"] == pytest.approx(1)
    unit = blocks / np.linalg.norm(blocks, axis=-1, keepdims=True)
    assert short.measured["length"] == pytest.approx(np.linalg.norm(unit[:, 2] - unit[:, 1], axis=-1).mean(), rel=1e-4)


def test_layers_without_filter_stand_still_at_every_other_station():
    finding = encoding_walk.analyse(subject_of(untrained=False, filter=None), paths=16)
    holds(finding, "straightness")
    assert "turn_angle" not in finding.measured


def test_what_has_no_walk():
    with pytest.raises(NotApplicable, match="no step"):
        encoding_walk.analyse(subject_of(depth=0))
    with pytest.raises(NotApplicable, match="it needs paths"):
        encoding_walk.analyse(Subject(model=model_of()))


# Nearness.


def test_nearness_by_hand_and_the_identity():
    rng = np.random.default_rng(0)
    c, U = rng.normal(size=(3, 6)), rng.normal(size=(4, 6))
    near = proximity.nearness(c, U)
    np.testing.assert_allclose(near["distance"], -0.5 * ((c[:, None] - U) ** 2).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(near["cosine"][0, 0], c[0] @ U[0] / np.linalg.norm(c[0]) / np.linalg.norm(U[0]))
    assert proximity.identity_error(c, U) < 1e-14


def test_scores_by_hand():
    log_p = np.array([[[1.0, 0, -1, 0], [3, -1, -1, -1]]])
    law = proximity.Law.of(log_p + 3, (1, 2))
    same = proximity.summarise(proximity.score(2 * log_p + 5, law).mean(0))
    np.testing.assert_allclose(same, [1, 1, 1, 1])
    opposite = proximity.summarise(proximity.score(-log_p, law).mean(0))
    assert opposite[0] == -1
    assert opposite[2] == 0


def test_proximity():
    finding = proximity.analyse(subject_of(Uniform(12)), paths=40)
    keys = [
        f"{what}_{name}" for what in ("share", "spearman", "top1", "top5", "top10") for name in ("distance", "cosine")
    ]
    holds(finding, *keys, "share_dot", "share_norm", "identity_error", "rotation_change")
    assert finding.measured["share_dot"] == pytest.approx(1, abs=1e-9)
    assert finding.measured["identity_error"] < 1e-12
    assert finding.measured["rotation_change"] < 1e-4 < finding.null["rotation_change.token_vectors_left"]
    nulls = ("random_vector", "other_context", "permuted_tokens", "untrained", "unigram")
    assert {f"{key}.{null}" for key in keys for null in nulls} <= set(finding.null)
    for null in ("random_vector", "permuted_tokens"):
        assert finding.null[f"share_dot.{null}"] < 0.2
    assert finding.null["top5_distance.chance"] == 5 / 12
    assert "by construction" in finding.verdict


def test_an_output_bias_is_what_the_dot_product_does_not_explain():
    finding = proximity.analyse(subject_of(Uniform(12), untrained=False, unembed_bias=True), paths=16)
    holds(finding)
    assert 0 < finding.measured["share_dot"] < 0.9999
    assert "share_dot.by_construction" not in finding.null
    assert "by construction" not in finding.verdict


def test_a_vector_added_to_all_output_vectors_changes_no_number():
    subject = subject_of(Uniform(6), untrained=False)
    U = subject.model.unembed
    moved = dataclasses.replace(U, weight=U.weight + 0.5)
    other = dataclasses.replace(subject, model=dataclasses.replace(subject.model, unembed=moved))
    one, two = (proximity.analyse(s, paths=16).measured for s in (subject, other))
    for name in one:
        if name.startswith("share"):
            assert one[name] == pytest.approx(two[name], abs=1e-4), name


def test_what_has_no_nearness():
    with pytest.raises(NotApplicable, match="2 tokens"):
        proximity.analyse(Subject(model=model_of(vocab_size=2), world=Uniform(2)))
    with pytest.raises(NotApplicable, match="it needs paths"):
        proximity.analyse(Subject(model=model_of()))


# Rotation.


def change(model):
    rotated = proximity.rotate(model, jax.random.key(3))
    assert float(jnp.abs(rotated.token_vectors - model.token_vectors).max()) > 0.1
    tokens = jnp.array([0, 3, 1, 4, 2, 2])
    return float(jnp.abs(next_log_probs(rotated, tokens) - next_log_probs(model, tokens)).max())


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Token shifts, and state spaces of each channel or with a direct term, meet single coordinates.
COORDINATES = {"lru", "rwkv4", "rwkv4_channel_mix", "rwkv7", "s4d", "s5"}


@pytest.mark.parametrize("norm", [slow("rms_norm"), "layer_norm"])
@pytest.mark.parametrize(
    "aggregate",
    quick({"lru", "gru"}, jw.aggregates.names()),
)
def test_rotating_the_space_changes_no_law(aggregate, norm):
    model = model_of(aggregate=aggregate, norm=norm, unembed_bias=True, depth=1)
    if aggregate in COORDINATES:
        with pytest.raises(NotApplicable, match="reads the stream coordinate by coordinate"):
            proximity.rotate(model, jax.random.key(3))
    else:
        assert change(model) < 1e-4


@pytest.mark.parametrize(
    "choices",
    [
        slow({"tied": True, "placement": "parallel"}),
        {"norm_bias": False, "norm_scale": False, "positions": "sinusoidal", "filter": None},
        slow({"positions": "none", "norm": "rms_norm", "filter": jw.MLPConfig(gated=True, activation="silu")}),
        slow({"norm": "layer_norm", "filter": jw.MLPConfig(bias=False)}),
        {
            "norm": "rms_norm",
            "norm_unit_offset": True,
            "embed_scale": 4.0,
            "embed_norm": True,
            "logit_softcap": 2.0,
            "position_offset": 2,
            "tied": True,
            "aggregate": jw.aggregates.config("attention", qk_norm=True, qk_norm_over="width", softcap=2.0),
        },
    ],
    ids=["tied", "sinusoidal", "gated", "no_bias", "gemma"],
)
def test_rotating_the_space_of_other_models(choices):
    assert change(model_of(depth=1, **choices)) < 1e-4


@pytest.mark.parametrize("norm", [slow("rms_norm"), "layer_norm"])
def test_rotation_is_exact_to_rounding_in_float64(norm, x64):
    model = to64(model_of(norm=norm, unembed_bias=True, aggregate=("attention", "fixed_mixing")))
    rope = jw.aggregates.config("attention", positions="rope", qk_norm=True, kv_heads=2)
    assert change(model) < 1e-10
    assert change(to64(model_of(norm=norm, tied=True, positions="none", aggregate=rope))) < 1e-10


@pytest.mark.parametrize("norm", quick({"layer_norm"}, ["rms_norm", "layer_norm"]))
@pytest.mark.parametrize("placement", quick({"sandwich"}, ["post", "res_post", "sandwich"]))
def test_norms_of_what_is_written_rotate_only_with_one_scale_for_all_coordinates(placement, norm):
    model = model_of(placement=placement, norm=norm, depth=1)
    with pytest.raises(NotApplicable, match=f"{placement}-norm"):
        proximity.rotate(model, jax.random.key(0))

    def even(norm):
        return norm and dataclasses.replace(norm, scale=jnp.full_like(norm.scale, 1.5))

    names = ("aggregate_out_norm", "filter_out_norm") if placement == "sandwich" else ("aggregate_norm", "filter_norm")
    evened = {name: even(getattr(model.layers[0], name)) for name in names}
    assert change(model.with_layer(0, **evened)) < 1e-4


def test_what_cannot_be_rotated_is_said():
    finding = proximity.analyse(
        dataclasses.replace(
            subject_of(untrained=False), model=model_of(placement="post", depth=1, vocab_size=3, max_length=8)
        ),
        paths=16,
    )
    holds(finding)
    assert "rotation_change" not in finding.measured
    assert "post-norm" in finding.conventions["rotation"]


def test_what_says_nothing_of_how_it_meets_the_stream_is_refused():
    @dataclasses.dataclass
    class Bare:
        table: Linear | None = None

    with pytest.raises(NotApplicable, match="Bare reads the stream coordinate by coordinate"):
        proximity._rotate_maps(Bare(), np.eye(4), np.ones(4), None)


# Beliefs.


def test_equal_prefixes_are_in_one_fold_and_so_are_paths_beyond_the_fork():
    tokens = np.random.default_rng(0).integers(0, 3, (400, 10))
    deal = belief_geometry.Deal.of(tokens)
    folds = deal.folds(tokens)
    of_prefix: dict[tuple, int] = {}
    for row, fold in zip(tokens, folds, strict=True):
        for t in range(1, 11):
            assert of_prefix.setdefault(tuple(row[:t]), fold[t - 1]) == fold[t - 1]
    assert 1 < deal.fork < 10
    assert (folds[:, deal.fork - 1 :] == folds[:, deal.fork - 1 : deal.fork]).all()
    assert np.bincount(folds[:, -1]).min() > 50


def test_a_planted_affine_map_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (200, 6))
    x = rng.normal(size=(200, 6, 5))
    y = x @ rng.normal(size=(5, 3)) + np.array([1.0, 2, 3])
    folds = belief_geometry.Deal.of(tokens).folds(tokens)
    doubled = np.concatenate([x, x], axis=-1)  # a singular fit

    def stream():
        for rows in (slice(0, 120), slice(120, 200)):
            yield (
                folds[rows],
                {"planted": (x[rows], y[rows]), "twice": (doubled[rows], y[rows]), "noise": (x[rows, ::-1], y[rows])},
            )

    fits, sums = belief_geometry.cross_fit(stream)
    r2 = {name: float(belief_geometry.r_squared(s.mean(0))) for name, s in sums.items()}
    assert r2["planted"] == pytest.approx(1, abs=1e-9)
    assert r2["twice"] == pytest.approx(1, abs=1e-9)
    assert abs(r2["noise"]) < 0.05
    np.testing.assert_allclose(belief_geometry.predict(fits["planted"], x, folds), y, atol=1e-8)


def ridge_fit(x, y, ridge):
    """Least squares with the penalty as rows of the design: no normal equations, no sums."""
    centre = x - x.mean(0)
    penalty = np.sqrt(ridge * (centre**2).sum()) * np.eye(x.shape[1])
    rows, targets = np.vstack([centre, penalty]), np.vstack([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
    return weight, y.mean(0) - x.mean(0) @ weight


def held_out_fits(x, y, folds):
    """The fit for each fold, and R^2: the ridge is the one that predicts each of the other folds from the rest."""
    fits, error = [], 0.0
    for fold in range(belief_geometry.FOLDS):

        def inner(ridge, fold=fold):
            total = 0.0
            for other in set(range(belief_geometry.FOLDS)) - {fold}:
                kept, out = (folds != fold) & (folds != other), folds == other
                weight, offset = ridge_fit(x[kept], y[kept], ridge)
                total += ((x[out] @ weight + offset - y[out]) ** 2).sum()
            return total

        out = folds == fold
        weight, offset = ridge_fit(x[~out], y[~out], min(belief_geometry.RIDGES, key=inner))
        fits.append(np.vstack([weight, offset]))
        error += ((x[out] @ weight + offset - y[out]) ** 2).sum()
    return fits, 1 - error / ((y - y.mean(0)) ** 2).sum()


@pytest.mark.parametrize("features", [4, 60])
def test_sums_give_the_fit_of_direct_least_squares_and_its_held_out_score(features):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 3, (300, 5))
    x = rng.normal(size=(300, 5, features)) / np.arange(1, features + 1) + 3
    y = np.tanh(x[..., :2]) + 3 * rng.normal(size=(300, 5, 2))  # so much noise that a ridge pays
    folds = belief_geometry.Deal.of(tokens).folds(tokens)

    def stream():
        for rows in (slice(0, 100), slice(100, 300)):
            yield folds[rows], {"it": (x[rows], y[rows])}

    fits, sums = belief_geometry.cross_fit(stream)
    direct, expected = held_out_fits(x.reshape(-1, features), y.reshape(-1, 2), folds.ravel())
    for fit, one in zip(fits["it"], direct, strict=True):
        np.testing.assert_allclose(np.vstack([fit.weight, fit.offset]), one, atol=1e-9)
    assert float(belief_geometry.r_squared(sums["it"].mean(0))) == pytest.approx(expected, abs=1e-10)


def test_the_score_of_a_model_is_that_of_its_context_vectors():
    subject = subject_of(untrained=False)
    finding = belief_geometry.analyse(subject, paths=100, points=9)
    tokens = subject.paths(100)
    folds = belief_geometry.Deal.of(tokens).folds(tokens).ravel()
    walk = jax.jit(jw.encoding_walk)
    context = np.concatenate([walk(subject.model, path).context for path in tokens]).astype(float)
    beliefs = np.concatenate([MESS3.beliefs(path)[1:] for path in tokens]).astype(float)
    assert finding.measured["r2"] == pytest.approx(held_out_fits(context, beliefs, folds)[1], abs=1e-4)


def test_belief_geometry():
    finding = belief_geometry.analyse(subject_of(), paths=200, points=81)
    holds(finding, "r2", "excess", "r2_best_station", "r2_all_stations")
    assert {"untrained", "world_law", "model_law", "last_token", "permuted"} <= set(finding.null)
    assert finding.null["world_law"] == pytest.approx(1, abs=1e-6)
    assert finding.null["permuted"] < 0.1
    assert finding.measured["r2"] > finding.null["permuted"] + 0.3
    assert finding.figures[0].name == "beliefs"
    assert len(finding.arrays["words"]) == 81


def test_belief_geometry_needs_beliefs():
    with pytest.raises(NotApplicable, match="no world"):
        belief_geometry.analyse(Subject(model=model_of()))
    with pytest.raises(NotApplicable, match="hidden Markov"):
        belief_geometry.analyse(subject_of(Uniform(4)))


def test_beliefs_that_the_untrained_model_holds_wholly_leave_no_excess():
    # The one-hot last token is the belief of a first-order chain, and without layers it is all that a model has.
    world = jw.worlds.make("markov", vocab_size=3, order=1)
    finding = belief_geometry.analyse(subject_of(world, depth=0, norm="rms_norm", positions="none"), paths=200)
    holds(finding, "r2")
    assert finding.measured["r2"] == pytest.approx(1, abs=1e-6)
    assert "excess" not in finding.measured
    assert "gap" not in finding.verdict


def test_excess_is_undefined_where_nothing_is_left():
    assert belief_geometry.excess(0.9, 0.8) == pytest.approx(0.5)
    assert np.isnan(belief_geometry.excess(1.0, 1.0))
