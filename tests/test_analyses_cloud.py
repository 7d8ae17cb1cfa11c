"""Clouds of contexts and the flow between them: by hand, by planted truth, by finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwalk.analyses import NotApplicable, Subject, _flow, _shapes, cloud, extrapolation
from jaxwalk.evidence.decision import Quantity
from jaxwalk.evidence.subject import Draw
from tests.conftest import model_of, to64
from tests.test_analyses_geometry import MESS3, Uniform, holds, subject_of


def rotation(rng, D):
    return np.linalg.qr(rng.normal(size=(D, D)))[0]


# The shape of one cloud.


def test_two_nn_by_hand():
    # Ratios of the second distance to the first: 3, 2 and 3/2.
    assert _shapes.two_nn(np.array([[0.0], [1], [3]])) == pytest.approx(2 / np.log(9))
    assert np.isnan(_shapes.two_nn(np.array([[0.0], [1]])))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_two_nn_of_a_cube_is_its_dimension(d):
    rng = np.random.default_rng(d)
    x = rng.uniform(size=(1500, d)) @ rotation(rng, 9)[:d]
    assert _shapes.two_nn(x) == pytest.approx(d, abs=4 * d / np.sqrt(1500))


@pytest.mark.parametrize("d", [2, 5])
def test_two_nn_of_a_torus_which_has_no_border(d):
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (1500, d))
    assert _shapes.two_nn(np.hstack([np.cos(angles), np.sin(angles)])) == pytest.approx(d, abs=4 * d / np.sqrt(1500))


def test_nearest_neighbours_know_no_place_no_scale_and_no_axes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    moved = 7 * x @ rotation(rng, 4) + 3
    for number in (_shapes.two_nn, _shapes.hubness):
        assert number(moved) == pytest.approx(number(x), rel=1e-9)


def test_points_at_one_place_to_rounding_are_one():
    x = np.array([[1.0, 0], [0, 1], [1, 1e-7], [0, 1], [5, 5]])
    np.testing.assert_array_equal(_shapes.distinct(x), [True, True, False, False, True])


def test_hubness_by_hand():
    # The centre is the nearest of four, and its own nearest is one of them: k-occurrences 4, 1, 0, 0, 0.
    star = np.array([[0.0, 0], [0.9, 0], [-1, 0], [0, 1], [0, -1]])
    assert _shapes.hubness(star, k=1) == pytest.approx(4.8 / 2.4**1.5)
    assert _shapes.hubness(np.array([[0.0], [1], [5], [6]]), k=1) == 0


def test_anisotropy_of_isotropic_and_of_shifted_clouds():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 16))
    assert abs(_shapes.mean_cosine(x)) < 1e-3
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(2000, dtype=bool)]
    assert _shapes.mean_cosine(x) == pytest.approx(cosines.mean(), abs=1e-12)
    # Shifted by as much as each point is away: half the squared length is common, and so is half the cosine.
    axes = np.concatenate([np.eye(4), -np.eye(4)])
    shifted = np.hstack([axes, np.ones((8, 1))])
    assert _shapes.mean_cosine(shifted) == pytest.approx((6 * 0.5 + 0) / 7)
    assert np.isnan(_shapes.mean_cosine(np.zeros((3, 2))))


def test_spectrum_participation_and_first_share():
    x = np.concatenate([np.eye(3), -np.eye(3)]) * np.array([2.0, 1, 1]) + 9
    eigenvalues = _shapes.spectrum(x)
    np.testing.assert_allclose(eigenvalues, [8 / 5, 2 / 5, 2 / 5])
    assert _shapes.first_share(eigenvalues) == pytest.approx(4 / 6)
    assert _shapes.participation_ratio(eigenvalues) == pytest.approx(36 / 18)
    np.testing.assert_allclose(
        _shapes.spectrum(np.hstack([x, np.zeros((6, 5))])), [8 / 5, 2 / 5, 2 / 5, 0, 0, 0], atol=1e-12
    )
    assert np.isnan(_shapes.participation_ratio(_shapes.spectrum(np.full((5, 2), 0.1) + 1e-9 * np.eye(5, 2))))


def test_convergence_of_groups_that_coincide_and_of_groups_that_are_none():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 60)
    assert _shapes.convergence_index(rng.normal(size=(5, 7))[labels], labels) == pytest.approx(1)
    x = rng.normal(size=(60, 7))
    permuted = [_shapes.convergence_index(x, rng.permutation(labels)) for _ in range(400)]
    assert abs(np.mean(permuted)) < 4 * np.std(permuted) / 20
    assert np.isnan(_shapes.convergence_index(x, np.zeros(60, int)))


def test_convergence_by_hand_and_its_mean_over_all_permutations():
    x = np.array([[0.0], [1], [2], [5]])
    # Within the groups {0, 1} and {2, 5}: 1/2 + 9/2; in all 14.
    assert _shapes.convergence_index(x, np.array([0, 0, 1, 1])) == pytest.approx(1 - 5 / 14 * 3 / 2)
    splits = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert np.mean([_shapes.convergence_index(x, np.array(s)) for s in splits]) == pytest.approx(0, abs=1e-12)
    alone = np.concatenate([x, [[99.0]]])
    assert _shapes.convergence_index(alone, np.array([0, 0, 1, 1, 2])) == pytest.approx(1 - 5 / 14 * 3 / 2)


def test_the_gaussian_null_has_the_mean_and_covariance():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(40, 3)) @ rng.normal(size=(3, 3)) + 5
    drawn = np.concatenate([_shapes.gaussian_like(x, rng) for _ in range(500)])
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
    np.testing.assert_allclose(expansion_rates(still, TOKENS, directions(model), STATIONS), 0, atol=1e-6)
    rates = expansion_rates(model, TOKENS, directions(model), STATIONS)
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
    np.testing.assert_allclose(expansion_rates(model, TOKENS, along, STATIONS), expected, atol=1e-8)


# The whole analysis of clouds.


def test_cloud():
    finding = cloud.analyse(subject_of(), paths=80)
    numbers = ["dimension", "anisotropy", "first_component", "hubness", "participation", "convergence_last_token"]
    holds(finding, *numbers, *(f"{name}_context" for name in numbers), "expansion", "convergence_last_token_change")
    assert {f"{name}.untrained" for name in numbers} <= set(finding.null)
    assert {"dimension.gaussian", "hubness.gaussian", "anisotropy.gaussian"} <= set(finding.null)
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
    assert finding.decision == "not testable here"
    assert "no untrained model" in finding.summary
    tokens = subject.paths(40, 4)
    walks = jax.jit(jax.vmap(subject.model.walk))(tokens)
    x = np.asarray(walks.stations[:, 4, 3], float)
    assert finding.measured["anisotropy"] == pytest.approx(_shapes.mean_cosine(x), rel=1e-4)
    assert finding.measured["convergence_last_token"] == pytest.approx(
        _shapes.convergence_index(x, tokens[:, 3]), rel=1e-4
    )
    assert finding.measured["participation"] == pytest.approx(
        _shapes.participation_ratio(_shapes.spectrum(x)), rel=1e-4
    )
    context = np.asarray(walks.context[:, 3], float)
    assert finding.measured["anisotropy_context"] == pytest.approx(_shapes.mean_cosine(context), rel=1e-4)
    whole = cloud.analyse(subject, paths=40, position=-5, stations=[2, 4])
    assert whole.measured == finding.measured  # -5 of 8 is 3


def test_contexts_that_mean_the_same_gather_only_where_they_do():
    rng = np.random.default_rng(0)
    n, D = 400, 6
    tokens, fitted = (rng.integers(0, 3, (n, 2)) for _ in range(2))
    following = [rng.integers(0, 2, n) for _ in range(2)]  # no function of the last token
    draws = Draw(tokens, np.arange(n)), Draw(fitted, np.arange(n))
    of_token, of_next = 3 * rng.normal(size=(3, D)), rng.normal(size=(2, D))

    def points(gathers):
        clouds = [
            of_token[d.tokens[:, -1]] + gathers * of_next[label] + rng.normal(size=(n, D))
            for d, label in zip(draws, following, strict=True)
        ]
        return cloud.Points(clouds[0][None], clouds[1][None], np.zeros((n, 1)))

    for gathers, decision in ((1.0, "supported"), (0.0, "contradicted")):
        quantity = cloud._gathering({"": points(gathers), "untrained": points(0.0)}, draws, following, 0, 0)
        contrast = cloud._contrast(quantity, following)
        assert contrast.decision == decision
        assert abs(contrast.reference) < 0.02
        assert quantity.references["permuted"] < 0.02
    # By the law of the variance: that of the two means, over it and that of the noise.
    spread = ((of_next[0] - of_next[1]) ** 2).sum() / 4
    quantity = cloud._gathering({"": points(1.0)}, draws, following, 0, 0)
    assert quantity.value == pytest.approx(spread / (spread + D), abs=0.05)
    assert cloud._contrast(quantity, following).decision == "not testable here"


def test_few_distinct_points_have_no_neighbours():
    finding = cloud.analyse(subject_of(untrained=False), paths=40, position=1)  # nine contexts
    holds(finding, "anisotropy", "participation")
    assert "dimension" not in finding.measured
    assert "dimension" in finding.conventions["left_out"]


def test_the_interval_of_the_dimension_is_as_wide_as_its_law_says():
    # The variance of the maximum-likelihood estimate is d^2 / n, and a jackknife is on average not below it.
    rng = np.random.default_rng(0)
    whole = _shapes.Cloud.of(rng.uniform(size=(400, 2)))
    draws = [_shapes.shape([whole.part(rng.permutation(400)[:200])], {}, 8)["dimension"][0] for _ in range(60)]
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
    states = flow(rng, 12, stretches, 3)
    scores = extrapolation.score(states[:, HALF], states[:, ~HALF], PAIRS, threshold=1e-3)
    np.testing.assert_allclose(scores.explained["extrapolated"], 1, atol=1e-12)
    np.testing.assert_allclose(scores.explained["least_squares"], 1, atol=1e-6)
    assert scores.explained["stay"].max() < 0.9
    assert (scores.rank == 3).all()
    assert np.isnan(scores.moment("kurtosis"))
    assert np.isnan(_flow.noise_variance(states, PAIRS)).all()


def test_a_rotation_of_any_cloud_is_recovered():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(WHOLE, 6)) * np.arange(1, 7) + 3
    states = np.stack([x, 2 * x @ rotation(rng, 6), 0.5 * x @ rotation(rng, 6)])
    scores = extrapolation.score(states[:, HALF], states[:, ~HALF], PAIRS[:2])
    np.testing.assert_allclose(scores.explained["extrapolated"], 1, atol=1e-10)


def test_signs_of_singular_vectors_are_aligned(monkeypatch):
    rng = np.random.default_rng(0)
    states = flow(rng, 8, np.array([[9.0, 3, 1]] * 5), 3)
    expected = _flow.bases(states)
    svd = np.linalg.svd

    def flipped(x, full_matrices):
        U, values, Vt = svd(x, full_matrices=full_matrices)
        signs = rng.choice([-1.0, 1.0], len(values))
        return U * signs, values, Vt * signs[:, None]

    monkeypatch.setattr(np.linalg, "svd", flipped)
    for _ in range(3):
        other = _flow.bases(states)
        for a, b in PAIRS:
            np.testing.assert_allclose(
                _flow.extrapolate(states[a], other[a], other[b], 3),
                _flow.extrapolate(states[a], expected[a], expected[b], 3),
                atol=1e-10,
            )


def test_small_singular_directions_are_dropped():
    one, other = (_flow.Basis(np.eye(3), np.array(v)) for v in ([10.0, 1, 0.05], [4.0, 0.5, 0.3]))
    assert _flow.kept(one, other) == 2
    assert _flow.kept(one, other, threshold=1e-3) == 3
    assert _flow.kept(one, other, rank=1) == 1
    np.testing.assert_allclose(_flow.extrapolate(np.array([[10.0, 1, 1]]), one, other, 2), [[4, 0.5, 0]])


def test_planted_noise_is_recovered():
    # A strong flow of two directions in a hundred, which carries hardly any of the noise of where it starts.
    rng = np.random.default_rng(3)
    alpha, rate, time = 1e-3, 0.5, np.arange(1.0, 6)
    states = flow(rng, 90, 3e3 * 0.6 ** time[:, None] * np.array([1.0, 0.5]), 2, alpha * np.exp(rate * time))
    fit = extrapolation.growth(_flow.noise_variance(states, PAIRS), time, PAIRS)
    assert fit["lambda"] == pytest.approx(rate, abs=0.02)
    assert fit["alpha"] == pytest.approx(alpha, rel=0.05)
    assert fit["r2"] > 0.99 > fit["r2_increment"]
    scores = extrapolation.score(states[:, HALF], states[:, ~HALF], PAIRS, rank=2)
    assert abs(scores.moment("kurtosis")) < 0.1
    assert scores.explained["extrapolated"].mean() > 0.95


def test_intervals_of_the_noise_cover_it_and_its_diffusion_is_unbiased():
    """Walks of the Langevin equation, whose drift is a rotation that leaves noise alone."""
    time, alpha, rate, D = np.arange(1.0, 6), 0.05, 0.4, 6
    covered, ratio = [], []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        drift = [rotation(rng, D) for _ in time[1:]]
        fits = []
        for _ in range(extrapolation.BLOCKS):
            states = [rng.normal(size=(40, D)) * np.linspace(3, 1, D) + 1]
            for turn, start, end in zip(drift, time, time[1:], strict=False):
                noise = np.sqrt(alpha * (np.exp(rate * end) - np.exp(rate * start))) * rng.normal(size=(40, D))
                states.append(states[-1] @ turn + noise)
            fits.append(extrapolation.growth(_flow.noise_variance(np.stack(states), PAIRS), time, PAIRS))
        low, high = Quantity("lambda", np.array([fit["lambda_increment"] for fit in fits])).interval
        covered.append(low < rate < high)
        ratio.append(np.mean([fit["diffusion_increment"] for fit in fits]) / (alpha * rate))
    assert 0.89 <= np.mean(covered) <= 0.99  # 95%, within three standard errors of 120 simulations
    assert np.mean(ratio) == pytest.approx(1, abs=4 * np.std(ratio) / np.sqrt(len(ratio)))
    assert np.std(ratio) / np.sqrt(len(ratio)) < 0.01


@pytest.mark.parametrize("rate", [-0.4, 0.0, 0.3])
def test_both_laws_of_growth_are_fitted_exactly(rate):
    start, end = (np.arange(1.0, 6)[list(side)] for side in zip(*PAIRS, strict=True))
    fit = _flow.fit_exponential(end, np.stack([0.7 + rate * end, rate * end]))
    np.testing.assert_allclose(fit.rate, rate, atol=1e-12)
    np.testing.assert_allclose(fit.log_scale, [0.7, 0], atol=1e-12)
    grown = np.log((np.exp(rate * end) - np.exp(rate * start)) / rate) if rate else np.log(end - start)
    fit = _flow.fit_increment(start, end, np.stack([0.7 + grown, grown]))
    np.testing.assert_allclose(fit.rate, rate, atol=1e-8)
    np.testing.assert_allclose(fit.log_scale, [0.7, 0], atol=1e-7)
    np.testing.assert_allclose(fit.r2, 1, atol=1e-12)
    assert _flow.fit_exponential(end, grown).r2 < 0.9


def test_moments_by_hand():
    x = np.array([[0.0, 5], [0, 5], [0, 5], [4, 5]])
    # 0, 0, 0, 4: mean 1, squares 3, cubes 24/4, fourth powers (3 + 81)/4; the other coordinate does not vary.
    assert _flow.moments(x) == pytest.approx(
        {"skewness": 6 / 3**1.5, "kurtosis": 21 / 9 - 3, "drift": np.sqrt(13 / 1.5)}
    )


def test_the_noise_by_hand():
    # Three points in one dimension that a line fits but for residuals 1, -2, 1 times 1/2.
    states = np.array([[[0.0], [1], [2]], [[0.5], [0], [2.5]]])
    assert np.isnan(_flow.noise_variance(states, [(0, 1)])[0])  # one degree of freedom of three is left
    twice = np.concatenate([states, states], axis=1)
    assert _flow.noise_variance(twice, [(0, 1)])[0] == pytest.approx(2 * 1.5 / (6 - 2))


def test_parts_share_no_document_and_score_nothing_that_was_fitted():
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(25), 8)
    to_fit, draw = (Draw(rng.integers(0, 2, (200, 5)), documents) for _ in range(2))
    with pytest.raises(NotApplicable, match="8 different paths, in each of 10 parts"):
        extrapolation.blocks(to_fit, draw)
    to_fit, draw = (Draw(rng.integers(0, 4, (200, 5)), documents) for _ in range(2))
    parts = extrapolation.blocks(to_fit, draw)
    assert len(parts) == 10
    assert sorted(np.concatenate([fitted for fitted, _ in parts])) == list(range(200))
    for fitted, held in parts:
        assert set(documents[fitted] % 10) == set(documents[held] % 10) == {documents[fitted[0]] % 10}
        assert not {tuple(t) for t in to_fit.tokens[fitted]} & {tuple(t) for t in draw.tokens[held]}


def test_the_least_squares_map_leaves_noise_alone():
    rng = np.random.default_rng(0)
    x, more = rng.normal(size=(80, 5)), rng.normal(size=(50, 5))
    A, b = rng.normal(size=(5, 4)), rng.normal(size=4)
    np.testing.assert_allclose(_flow.Ridge(x).predict(x @ A + b, more), more @ A + b, atol=1e-5)
    still = _flow.Ridge(np.ones((80, 5))).predict(x, more)
    np.testing.assert_allclose(still, np.broadcast_to(x.mean(0), (50, 5)))


# The whole analysis of the flow.


def test_extrapolation():
    finding = extrapolation.analyse(subject_of(depth=5), paths=320)
    holds(finding, "explained", "explained_one_step", "lambda", "alpha", "r2", "r2_increment", "kurtosis", "skewness")
    assert set(finding.interval) == set(finding.measured)
    assert {"stay", "mean", "least_squares", "untrained"} <= set(finding.null)
    assert {"explained_one_step.stay", "lambda.untrained", "kurtosis.untrained"} <= set(finding.null)
    assert finding.null["least_squares"] > finding.measured["explained"]
    assert finding.decision == "contradicted"
    assert [f.name for f in finding.figures] == ["explained", "explained_by_gap", "residual_variance"]
    np.testing.assert_array_equal(np.unique(finding.arrays["end"]), [2, 3, 4, 5])
    assert np.isnan(finding.arrays["explained_extrapolated"][1, 0])


def test_few_stations_decide_nothing_and_have_no_law_of_growth():
    finding = extrapolation.analyse(subject_of(depth=3), paths=320)
    holds(finding, "explained")
    assert finding.decision == "not testable here"
    assert "lambda" not in finding.measured
    assert [f.name for f in finding.figures] == ["explained", "explained_by_gap"]


def test_a_flow_decides_by_staying_put_untrained_and_any_linear_map():
    rng = np.random.default_rng(0)
    shares = {"stay": 0.5, "untrained": 0.4, "least_squares": 0.95}
    for value, stations, decisions in (
        (0.92, 5, ("supported", "supported")),
        (0.7, 5, ("supported", "contradicted")),
        (0.5, 5, ("contradicted", "contradicted")),
        (0.92, 4, ("not testable here", "not testable here")),
    ):
        blocks = {name: mean + 0.01 * rng.normal(size=10) for name, mean in {"": value, **shares}.items()}
        explained = Quantity("explained", blocks.pop(""), blocks)
        contrasts = extrapolation._contrasts(explained, stations)
        assert tuple(contrast.decision for contrast in contrasts) == decisions
        assert contrasts[0].null in ("stay", "")  # the stronger one


def test_conventions_of_the_flow_change_its_stations():
    subject = subject_of(untrained=False)
    finding = extrapolation.analyse(subject, paths=320, stations="steps", embedding=True, position=6, rank=2)
    holds(finding)
    assert "no untrained model" in finding.primary[0].reason
    assert finding.arrays["rank"].max() == 2
    np.testing.assert_array_equal(np.unique(finding.arrays["end"]), [0.5, 1, 1.5, 2])
    tokens = subject.paths(64, 7)
    states = np.asarray(jax.jit(jax.vmap(subject.model.walk))(tokens).stations, float)[:, :, 6].swapaxes(0, 1)
    np.testing.assert_allclose(extrapolation.states_of(subject.model, tokens, np.arange(5)), states, atol=1e-5)


def test_layers_that_do_nothing_leave_no_noise():
    model = model_of(vocab_size=3, max_length=8, depth=5, positions="none")
    still = dataclasses.replace(model, layers=jax.tree.map(jnp.zeros_like, model.layers))
    finding = extrapolation.analyse(Subject(model=still, world=MESS3), paths=320)
    holds(finding, "explained")
    assert finding.measured["explained"] == pytest.approx(1, abs=1e-9)
    assert finding.null["stay"] == pytest.approx(1, abs=1e-9)
    assert "lambda" not in finding.measured


def test_what_has_no_flow():
    with pytest.raises(NotApplicable, match="3 stations"):
        extrapolation.analyse(subject_of(depth=2))
    with pytest.raises(NotApplicable, match="it needs paths"):
        extrapolation.analyse(Subject(model=model_of(depth=3)))
    with pytest.raises(NotApplicable, match="8 different paths"):
        extrapolation.analyse(subject_of(Uniform(2), depth=3), position=2, paths=64)
    for wrong, options in (("rank", {"rank": 17}), ("threshold", {"threshold": 1.0})):
        with pytest.raises(ValueError, match=f"{wrong}: expected"):
            extrapolation.analyse(subject_of(depth=3), **options)


# Untrained models.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("analysis", "paths", "choices"), [(cloud, 128, {}), (extrapolation, 320, {"depth": 5})], ids=["cloud", "flow"]
)
def test_untrained_models_support_nothing(analysis, paths, choices):
    choices = {"vocab_size": 3, "max_length": 8, **choices}
    decisions = []
    for seed in range(20):
        models = {"model": model_of(seed=seed, **choices), "untrained": model_of(seed=100 + seed, **choices)}
        finding = analysis.analyse(Subject(**models, world=MESS3, seed=seed), paths=paths)
        decisions += [contrast.decision for contrast in finding.primary]
    assert np.mean([decision == "supported" for decision in decisions]) <= 0.05
