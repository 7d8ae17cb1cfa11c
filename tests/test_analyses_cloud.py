"""Clouds of contexts and the flow between them: by hand, by planted truth, by finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwalk.analyses import NotApplicable, Subject, cloud, extrapolation
from tests.conftest import model_of, to64
from tests.test_analyses_geometry import MESS3, Uniform, holds, subject_of


def rotation(rng, D):
    return np.linalg.qr(rng.normal(size=(D, D)))[0]


# The shape of one cloud.


def test_two_nn_by_hand():
    # Ratios of the second distance to the first: 3, 2 and 3/2.
    assert cloud.two_nn(np.array([[0.0], [1], [3]])) == pytest.approx(2 / np.log(9))
    assert np.isnan(cloud.two_nn(np.array([[0.0], [1]])))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_two_nn_of_a_cube_is_its_dimension(d):
    rng = np.random.default_rng(d)
    x = rng.uniform(size=(1500, d)) @ rotation(rng, 9)[:d]
    assert cloud.two_nn(x) == pytest.approx(d, abs=4 * d / np.sqrt(1500))


@pytest.mark.parametrize("d", [2, 5])
def test_two_nn_of_a_torus_which_has_no_border(d):
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (1500, d))
    assert cloud.two_nn(np.hstack([np.cos(angles), np.sin(angles)])) == pytest.approx(d, abs=4 * d / np.sqrt(1500))


def test_nearest_neighbours_know_no_place_no_scale_and_no_axes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    moved = 7 * x @ rotation(rng, 4) + 3
    for number in (cloud.two_nn, cloud.hubness):
        assert number(moved) == pytest.approx(number(x), rel=1e-9)


def test_points_at_one_place_to_rounding_are_one():
    x = np.array([[1.0, 0], [0, 1], [1, 1e-7], [0, 1], [5, 5]])
    np.testing.assert_array_equal(cloud.distinct(x), [True, True, False, False, True])


def test_hubness_by_hand():
    # The centre is the nearest of four, and its own nearest is one of them: k-occurrences 4, 1, 0, 0, 0.
    star = np.array([[0.0, 0], [0.9, 0], [-1, 0], [0, 1], [0, -1]])
    assert cloud.hubness(star, k=1) == pytest.approx(4.8 / 2.4**1.5)
    assert cloud.hubness(np.array([[0.0], [1], [5], [6]]), k=1) == 0


def test_anisotropy_of_isotropic_and_of_shifted_clouds():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 16))
    assert abs(cloud.mean_cosine(x)) < 1e-3
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(2000, dtype=bool)]
    assert cloud.mean_cosine(x) == pytest.approx(cosines.mean(), abs=1e-12)
    # Shifted by as much as each point is away: half the squared length is common, and so is half the cosine.
    axes = np.concatenate([np.eye(4), -np.eye(4)])
    shifted = np.hstack([axes, np.ones((8, 1))])
    assert cloud.mean_cosine(shifted) == pytest.approx((6 * 0.5 + 0) / 7)
    assert np.isnan(cloud.mean_cosine(np.zeros((3, 2))))


def test_spectrum_participation_and_first_share():
    x = np.concatenate([np.eye(3), -np.eye(3)]) * np.array([2.0, 1, 1]) + 9
    eigenvalues = cloud.spectrum(x)
    np.testing.assert_allclose(eigenvalues, [8 / 5, 2 / 5, 2 / 5])
    assert cloud.first_share(eigenvalues) == pytest.approx(4 / 6)
    assert cloud.participation_ratio(eigenvalues) == pytest.approx(36 / 18)
    np.testing.assert_allclose(
        cloud.spectrum(np.hstack([x, np.zeros((6, 5))])), [8 / 5, 2 / 5, 2 / 5, 0, 0, 0], atol=1e-12
    )
    assert np.isnan(cloud.participation_ratio(cloud.spectrum(np.full((5, 2), 0.1) + 1e-9 * np.eye(5, 2))))


def test_convergence_of_groups_that_coincide_and_of_groups_that_are_none():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 60)
    assert cloud.convergence_index(rng.normal(size=(5, 7))[labels], labels) == pytest.approx(1)
    x = rng.normal(size=(60, 7))
    permuted = [cloud.convergence_index(x, rng.permutation(labels)) for _ in range(400)]
    assert abs(np.mean(permuted)) < 4 * np.std(permuted) / 20
    assert np.isnan(cloud.convergence_index(x, np.zeros(60, int)))


def test_convergence_by_hand_and_its_mean_over_all_permutations():
    x = np.array([[0.0], [1], [2], [5]])
    # Within the groups {0, 1} and {2, 5}: 1/2 + 9/2; in all 14.
    assert cloud.convergence_index(x, np.array([0, 0, 1, 1])) == pytest.approx(1 - 5 / 14 * 3 / 2)
    splits = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert np.mean([cloud.convergence_index(x, np.array(s)) for s in splits]) == pytest.approx(0, abs=1e-12)
    alone = np.concatenate([x, [[99.0]]])
    assert cloud.convergence_index(alone, np.array([0, 0, 1, 1, 2])) == pytest.approx(1 - 5 / 14 * 3 / 2)


def test_the_gaussian_null_has_the_mean_and_covariance():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(40, 3)) @ rng.normal(size=(3, 3)) + 5
    drawn = np.concatenate([cloud.gaussian_like(x, rng) for _ in range(500)])
    np.testing.assert_allclose(drawn.mean(0), x.mean(0), atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(x.T), rtol=0.1, atol=0.02)


# Expansion.


TOKENS = jnp.array([0, 3, 1, 4, 2])
STATIONS = np.array([0, 1, 3, 4])
expansion_rates = jax.jit(cloud.expansion_rates)


def directions(model):
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, model.width)), model.token_vectors.dtype)


def test_a_stream_that_only_carries_expands_nothing():
    model = model_of()
    still = dataclasses.replace(model, layers=jax.tree.map(jnp.zeros_like, model.layers))
    np.testing.assert_allclose(expansion_rates(still, TOKENS, STATIONS, directions(model)), 0, atol=1e-6)
    rates = expansion_rates(model, TOKENS, STATIONS, directions(model))
    assert np.abs(rates[:3]).min() > 1e-3
    assert rates[3] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("choices", [{}, {"placement": "post", "aggregate": "causal_mean"}], ids=["pre", "post"])
def test_expansion_agrees_with_finite_differences(choices, x64):
    model = to64(model_of(**choices))
    along = directions(model)

    @jax.jit
    def end(station, step):
        nudge = jnp.zeros((5, 5, model.width)).at[station, -1].set(step)
        return model.walk(TOKENS, nudge=nudge).stations[-1, -1]

    expected = []
    for station, direction in zip(STATIONS, along, strict=True):
        change = (end(station, 1e-5 * direction) - end(station, -1e-5 * direction)) / 2e-5
        expected.append(np.log(np.linalg.norm(change) / np.linalg.norm(direction)))
    np.testing.assert_allclose(expansion_rates(model, TOKENS, STATIONS, along), expected, atol=1e-8)


# The whole analysis of clouds.


def test_cloud():
    finding = cloud.analyse(subject_of(), paths=80)
    numbers = ["dimension", "anisotropy", "first_component", "hubness", "participation", "convergence_last_token"]
    holds(finding, *numbers, *(f"{name}_context" for name in numbers), "expansion", "convergence_last_token_change")
    assert {f"{name}.untrained" for name in numbers} <= set(finding.null)
    assert {"dimension.gaussian", "hubness.gaussian", "anisotropy.gaussian"} <= set(finding.null)
    assert abs(finding.null["convergence_last_token.permuted"]) < finding.null["convergence_last_token.permuted_high"]
    # At the embedding, the last token is all that there is: three points, too few for neighbours.
    assert finding.arrays["convergence_last_token"][0] == pytest.approx(1, abs=1e-9)
    assert finding.arrays["distinct_points"][0] == 3
    assert np.isnan(finding.arrays["dimension"][0])
    assert finding.arrays["expansion"][-1] == pytest.approx(0, abs=1e-6)
    assert [f.name for f in finding.figures] == [
        "dimension_by_station",
        "convergence_by_station",
        "expansion_by_station",
    ]


def test_the_points_are_the_stations_of_the_chosen_position():
    subject = subject_of(untrained=False)
    finding = cloud.analyse(subject, paths=40, position=3, stations=[2, 4])
    holds(finding)
    assert "untrained" in finding.conventions
    tokens = subject.paths(40, 4)
    walks = jax.jit(jax.vmap(subject.model.walk))(tokens)
    x = np.asarray(walks.stations[:, 4, 3], float)
    assert finding.measured["anisotropy"] == pytest.approx(cloud.mean_cosine(x), rel=1e-4)
    assert finding.measured["convergence_last_token"] == pytest.approx(
        cloud.convergence_index(x, tokens[:, 3]), rel=1e-4
    )
    assert finding.measured["participation"] == pytest.approx(cloud.participation_ratio(cloud.spectrum(x)), rel=1e-4)
    context = np.asarray(walks.context[:, 3], float)
    assert finding.measured["anisotropy_context"] == pytest.approx(cloud.mean_cosine(context), rel=1e-4)
    whole = cloud.analyse(subject, paths=40, position=-5, stations=[2, 4])
    assert whole.measured == finding.measured  # -5 of 8 is 3


def test_few_distinct_points_have_no_neighbours():
    finding = cloud.analyse(subject_of(untrained=False), paths=40, position=1)  # nine contexts
    holds(finding, "anisotropy", "participation")
    assert "dimension" not in finding.measured
    assert finding.conventions["left_out"]["dimension"] == "9 distinct points, of at least 32"


def test_the_interval_of_the_dimension_is_as_wide_as_its_law_says():
    # The variance of the maximum-likelihood estimate is d^2 / n, and a jackknife is on average not below it.
    rng = np.random.default_rng(0)
    whole = cloud.Cloud.of(rng.uniform(size=(400, 2)))
    draws = [cloud._each([whole.part(rng.permutation(400)[:200])], {}, 8)["dimension"][0] for _ in range(60)]
    assert 0.9 < np.std(draws) / (2 / np.sqrt(400)) < 2


def test_what_has_no_cloud():
    with pytest.raises(NotApplicable, match="no layers"):
        cloud.analyse(subject_of(depth=0))
    with pytest.raises(NotApplicable, match="it needs paths"):
        cloud.analyse(Subject(model=model_of()))
    with pytest.raises(NotApplicable, match="at least 16 paths, got 8"):
        cloud.analyse(subject_of(), paths=8)


@pytest.mark.parametrize("position", [0, 8, -8])
def test_unknown_positions_and_stations_list_what_there_is(position):
    for analysis in (cloud, extrapolation):
        with pytest.raises(
            ValueError, match=rf"from 1 to 7, or from -7 to -1, got {position}\. Position 0 is left out"
        ):
            analysis.analyse(subject_of(depth=3), position=position)
    for stations in ([5], [-1], []):
        with pytest.raises(ValueError, match=r"stations: expected some of 0 to 4"):
            cloud.analyse(subject_of(), stations=stations)


# The flow.

WHOLE = 200
HALF = np.arange(WHOLE) % 2 == 1
PAIRS = [(a, b) for a in range(5) for b in range(a + 1, 5)]
ONE = np.full((1, WHOLE), 1 / WHOLE)


def flow(rng, D, stretches, rank, noise=()):
    """States [K, n, D] of a planted flow whose singular vectors turn at random from station to station.

    Coordinates are orthonormal in each half of the paths, so that both halves have the planted singular values.
    """
    coordinates = np.empty((WHOLE, rank))
    for side in (HALF, ~HALF):
        coordinates[side] = np.linalg.qr(rng.normal(size=(WHOLE // 2, rank)))[0]
    states = np.stack([coordinates * values @ rotation(rng, D)[:rank] for values in stretches])
    for x, variance in zip(states, noise, strict=False):
        x += np.sqrt(variance) * rng.normal(size=x.shape)
    return states


def test_a_planted_flow_is_recovered_exactly_on_held_out_paths():
    rng = np.random.default_rng(0)
    stretches = np.exp(rng.normal(size=(5, 3)) / 4) * np.array([100.0, 20, 4])
    scores = extrapolation.score(flow(rng, 12, stretches, 3), HALF, PAIRS, ONE, threshold=1e-3)
    np.testing.assert_allclose(scores.explained["extrapolated"], 1, atol=1e-12)
    np.testing.assert_allclose(scores.explained["least_squares"], 1, atol=1e-6)
    np.testing.assert_allclose(scores.explained["mean"], 0, atol=1e-12)
    assert scores.explained["stay"].max() < 0.9
    assert (scores.rank == 3).all()
    assert scores.exact.all()


def test_a_rotation_of_any_cloud_is_recovered():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(WHOLE, 6)) * np.arange(1, 7) + 3
    states = np.stack([x, 2 * x @ rotation(rng, 6), 0.5 * x @ rotation(rng, 6)])
    scores = extrapolation.score(states, HALF, PAIRS[:2], ONE)
    np.testing.assert_allclose(scores.explained["extrapolated"], 1, atol=1e-10)


def test_signs_of_singular_vectors_are_aligned(monkeypatch):
    rng = np.random.default_rng(0)
    states = flow(rng, 8, np.array([[9.0, 3, 1]] * 5), 3)
    expected = extrapolation.bases(states)
    svd = np.linalg.svd

    def flipped(x, full_matrices):
        U, values, Vt = svd(x, full_matrices=full_matrices)
        signs = rng.choice([-1.0, 1.0], len(values))
        return U * signs, values, Vt * signs[:, None]

    monkeypatch.setattr(np.linalg, "svd", flipped)
    for _ in range(3):
        other = extrapolation.bases(states)
        for a, b in PAIRS:
            np.testing.assert_allclose(
                extrapolation.extrapolate(states[a], other[a], other[b], 3),
                extrapolation.extrapolate(states[a], expected[a], expected[b], 3),
                atol=1e-10,
            )


def test_small_singular_directions_are_dropped():
    one, other = (extrapolation.Basis(np.eye(3), np.array(v)) for v in ([10.0, 1, 0.05], [4.0, 0.5, 0.3]))
    assert extrapolation.kept(one, other) == 2
    assert extrapolation.kept(one, other, threshold=1e-3) == 3
    assert extrapolation.kept(one, other, rank=1) == 1
    np.testing.assert_allclose(extrapolation.extrapolate(np.array([[10.0, 1, 1]]), one, other, 2), [[4, 0.5, 0]])


def test_planted_noise_is_recovered_within_its_intervals():
    # A strong flow of two directions in a hundred, which carries hardly any of the noise of where it starts.
    rng = np.random.default_rng(3)
    alpha, rate, time = 1e-3, 0.5, np.arange(1.0, 6)
    states = flow(rng, 100, 3e3 * 0.6 ** time[:, None] * np.array([1.0, 0.5]), 2, alpha * np.exp(rate * time))
    weights = np.concatenate([ONE, extrapolation.resampled_means(np.eye(WHOLE))])
    scores = extrapolation.score(states, HALF, PAIRS, weights, rank=2)
    found = extrapolation._numbers(scores, time, PAIRS)
    for name, truth in (("lambda", rate), ("alpha", np.log(alpha))):
        assert abs(found[name][0] - truth) < 1.96 * found[name][1:].std() < 0.1, name
    assert found["r2"][0] > 0.99 > found["r2_increment"][0]
    assert abs(found["kurtosis"][0]) < 0.1
    assert found["explained"][0] > 0.95


@pytest.mark.parametrize("rate", [-0.4, 0.0, 0.3])
def test_both_laws_of_growth_are_fitted_exactly(rate):
    start, end = (np.arange(1.0, 6)[list(side)] for side in zip(*PAIRS, strict=True))
    fit = extrapolation.fit_exponential(end, np.stack([0.7 + rate * end, rate * end]))
    np.testing.assert_allclose(fit.rate, rate, atol=1e-12)
    np.testing.assert_allclose(fit.log_scale, [0.7, 0], atol=1e-12)
    grown = np.log((np.exp(rate * end) - np.exp(rate * start)) / rate) if rate else np.log(end - start)
    fit = extrapolation.fit_increment(start, end, np.stack([0.7 + grown, grown]))
    np.testing.assert_allclose(fit.rate, rate, atol=1e-8)
    np.testing.assert_allclose(fit.log_scale, [0.7, 0], atol=1e-7)
    np.testing.assert_allclose(fit.r2, 1, atol=1e-12)
    assert extrapolation.fit_exponential(end, grown).r2 < 0.9


def test_moments_by_hand_and_weights_that_count_rows():
    x = np.array([[0.0, 5], [0, 5], [0, 5], [4, 5]])
    found = extrapolation.moments(x, np.full((1, 4), 0.25))
    # 0, 0, 0, 4: mean 1, squares 3, cubes 24/4, fourth powers (3 + 81)/4; the other coordinate does not vary.
    assert found["variance"][0] == pytest.approx(3 * 4 / 3 / 2)
    assert found["skewness"][0] == pytest.approx(6 / 3**1.5)
    assert found["kurtosis"][0] == pytest.approx(21 / 9 - 3)
    assert found["drift"][0] == pytest.approx(np.sqrt(13 / 1.5))
    rows = np.random.default_rng(0).normal(size=(4, 3)) + 2
    doubled = extrapolation.moments(rows, np.array([[0.5, 0.25, 0.25, 0]]))
    direct = extrapolation.moments(rows[[0, 0, 1, 2]], np.full((1, 4), 0.25))
    for name in doubled:
        np.testing.assert_allclose(doubled[name], direct[name], rtol=1e-10)


def test_equal_paths_are_in_one_half():
    tokens = np.random.default_rng(0).integers(0, 2, (200, 5))
    half, count = extrapolation.deal(tokens, 0)
    assert count == len({tuple(row) for row in tokens})
    side = {}
    for row, where in zip(tokens, half, strict=True):
        assert side.setdefault(tuple(row), where) == where
    assert 50 < half.sum() < 150


def test_the_least_squares_map_leaves_noise_alone():
    rng = np.random.default_rng(0)
    x, more = rng.normal(size=(80, 5)), rng.normal(size=(50, 5))
    A, b = rng.normal(size=(5, 4)), rng.normal(size=4)
    np.testing.assert_allclose(extrapolation.Ridge(x).predict(x @ A + b, more), more @ A + b, atol=1e-5)
    still = extrapolation.Ridge(np.ones((80, 5))).predict(x, more)
    np.testing.assert_allclose(still, np.broadcast_to(x.mean(0), (50, 5)))


# The whole analysis of the flow.


def test_extrapolation():
    finding = extrapolation.analyse(subject_of(depth=3), paths=80)
    holds(finding, "explained", "explained_one_step", "lambda", "alpha", "r2", "r2_increment", "kurtosis", "skewness")
    for name in ("stay", "mean", "least_squares", "untrained"):
        assert {f"explained.{name}", f"explained_one_step.{name}"} <= set(finding.null)
    assert finding.null["explained.least_squares"] > finding.measured["explained"]
    assert {"lambda.untrained", "kurtosis.untrained", "kurtosis.gaussian"} <= set(finding.null)
    assert [f.name for f in finding.figures] == ["explained", "explained_by_gap", "residual_variance"]
    np.testing.assert_array_equal(finding.arrays["end"], [2, 3, 3])
    assert np.isnan(finding.arrays["explained_extrapolated"][1, 0])


def test_conventions_of_the_flow_change_its_stations():
    subject = subject_of(untrained=False)
    finding = extrapolation.analyse(subject, paths=64, stations="steps", embedding=True, position=6, rank=2)
    holds(finding)
    assert "untrained" in finding.conventions
    assert finding.arrays["rank"].max() == 2
    np.testing.assert_array_equal(np.unique(finding.arrays["end"]), [0.5, 1, 1.5, 2])
    tokens = subject.paths(64, 7)
    states = np.asarray(jax.jit(jax.vmap(subject.model.walk))(tokens).stations, float)[:, :, 6].swapaxes(0, 1)
    np.testing.assert_allclose(extrapolation.walked(subject.model, tokens, np.arange(5)), states, atol=1e-5)


def test_layers_that_do_nothing_leave_no_noise():
    model = model_of(vocab_size=3, max_length=8, depth=3, positions="none")
    still = dataclasses.replace(model, layers=jax.tree.map(jnp.zeros_like, model.layers))
    finding = extrapolation.analyse(Subject(model=still, world=MESS3), paths=64)
    holds(finding, "explained")
    assert finding.measured["explained"] == pytest.approx(1, abs=1e-9)
    assert finding.null["explained.stay"] == pytest.approx(1, abs=1e-9)
    assert "lambda" not in finding.measured
    assert "no residuals" in finding.verdict


def test_what_has_no_flow():
    with pytest.raises(NotApplicable, match="3 stations"):
        extrapolation.analyse(subject_of(depth=2))
    with pytest.raises(NotApplicable, match="it needs paths"):
        extrapolation.analyse(Subject(model=model_of(depth=3)))
    with pytest.raises(NotApplicable, match="32 different paths"):
        extrapolation.analyse(subject_of(Uniform(2), depth=3), position=2, paths=64)
    for wrong, options in (("rank", {"rank": 17}), ("threshold", {"threshold": 1.0})):
        with pytest.raises(ValueError, match=f"{wrong}: expected"):
            extrapolation.analyse(subject_of(depth=3), **options)
