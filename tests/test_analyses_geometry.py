"""The shape of walks, the nearness of vectors, and the beliefs in them: by hand, by planted truth, by identities."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import Finding, NotApplicable, Subject, belief_geometry, encoding_walk
from jaxwalk.evidence import regression
from jaxwalk.evidence.decision import Quantity
from jaxwalk.evidence.engine import measure
from tests.conftest import Uniform, model_of

MESS3 = jw.worlds.make("mess3")


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
    assert all(check.passed for check in finding.checks)
    assert finding.arrays["lens_kl"][-1] == 0
    assert {f"{n}.untrained" for n in finding.measured} - {"loss.untrained"} <= set(finding.null)
    assert {"current_token", "first_station", "untrained"} <= set(finding.null)
    assert len(finding.primary) == 2
    assert finding.decision != "supported"
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
    assert not any(name.endswith("untrained") for name in finding.null)
    short = encoding_walk.analyse(subject, paths=16, stations="blocks", embedding=False, normalised=True)
    holds(short)
    assert "turn_angle" not in short.measured
    assert short.primary[1].decision == "not testable here"
    assert short.measured["straightness"] == pytest.approx(1)
    unit = blocks / np.linalg.norm(blocks, axis=-1, keepdims=True)
    assert short.measured["length"] == pytest.approx(np.linalg.norm(unit[:, 2] - unit[:, 1], axis=-1).mean(), rel=1e-4)


def test_layers_without_filter_stand_still_at_every_other_station():
    finding = encoding_walk.analyse(subject_of(untrained=False, filter=None), paths=16)
    holds(finding, "straightness")
    assert "turn_angle" not in finding.measured


def walk_decisions(world, last, before, stations=5):
    """The decisions where the losses of both stations are these functions of the world's and the current token's."""
    subject = subject_of(world, untrained=False)
    tokens, at = subject.paths(200), np.arange(8)
    fitted = subject.draw(20000, to_fit=True).tokens
    ngram = encoding_walk.fit_ngrams(fitted, np.ones_like(fitted), world.vocab_size, 1, 4.0)
    current = measure(encoding_walk._ngram_loss, ngram, tokens, shared=(at,))[:, 1:-1].mean(1)
    ideal = measure(encoding_walk._world_loss, world, tokens, shared=(at,))[:, 1:-1].mean(1)
    losses = {
        name: Quantity(name, loss(ideal, current), {"current_token": current})
        for name, loss in {"loss": last, "loss_before_last": before}.items()
    }
    return [contrast.decision for contrast in encoding_walk._contrasts(losses, world, tokens, at, stations)]


def test_a_walk_must_compose_more_than_the_current_token_before_its_last_step():
    ideal, current = (lambda ideal, current: ideal), (lambda ideal, current: current)
    assert walk_decisions(MESS3, ideal, ideal) == ["supported", "supported"]
    assert walk_decisions(MESS3, ideal, current) == ["supported", "contradicted"]
    assert walk_decisions(MESS3, current, current, 2) == ["contradicted", "not testable here"]
    chain = jw.worlds.make("markov", vocab_size=3, order=1)
    assert walk_decisions(chain, ideal, ideal) == ["not testable here"] * 2


def test_what_has_no_walk():
    with pytest.raises(NotApplicable, match="no step"):
        encoding_walk.analyse(subject_of(depth=0))
    with pytest.raises(NotApplicable, match="it needs paths"):
        encoding_walk.analyse(Subject(model=model_of()))


# Beliefs.


def test_equal_prefixes_are_in_one_fold_and_so_are_paths_beyond_the_fork():
    tokens = np.random.default_rng(0).integers(0, 3, (400, 10))
    deal = regression.Deal.of(tokens)
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
    folds = regression.Deal.of(tokens).folds(tokens)
    doubled = np.concatenate([x, x], axis=-1)  # a singular fit
    fits = {name: regression.cross_fit(v, y, folds) for name, v in
            {"planted": x, "twice": doubled, "noise": x[::-1]}.items()}  # fmt: skip
    r2 = {name: float(regression.r_squared(fit.sums.mean(0))) for name, fit in fits.items()}
    assert r2["planted"] == pytest.approx(1, abs=1e-9)
    assert r2["twice"] == pytest.approx(1, abs=1e-9)
    assert abs(r2["noise"]) < 0.05
    np.testing.assert_allclose(regression.predict(fits["planted"].maps, x, folds), y, atol=1e-8)


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
    for fold in range(regression.FOLDS):

        def inner(ridge, fold=fold):
            total = 0.0
            for other in set(range(regression.FOLDS)) - {fold}:
                kept, out = (folds != fold) & (folds != other), folds == other
                weight, offset = ridge_fit(x[kept], y[kept], ridge)
                total += ((x[out] @ weight + offset - y[out]) ** 2).sum()
            return total

        out = folds == fold
        weight, offset = ridge_fit(x[~out], y[~out], min(regression.RIDGES, key=inner))
        fits.append(np.vstack([weight, offset]))
        error += ((x[out] @ weight + offset - y[out]) ** 2).sum()
    return fits, 1 - error / ((y - y.mean(0)) ** 2).sum()


@pytest.mark.parametrize("features", [4, 60])
def test_sums_give_the_fit_of_direct_least_squares_and_its_held_out_score(features):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 3, (300, 5))
    x = rng.normal(size=(300, 5, features)) / np.arange(1, features + 1) + 3
    y = np.tanh(x[..., :2]) + 3 * rng.normal(size=(300, 5, 2))  # so much noise that a ridge pays
    folds = regression.Deal.of(tokens).folds(tokens)

    fit = regression.cross_fit(x, y, folds)
    direct, expected = held_out_fits(x.reshape(-1, features), y.reshape(-1, 2), folds.ravel())
    for fold, one in zip(fit.maps, direct, strict=True):
        np.testing.assert_allclose(np.vstack([fold.weight, fold.offset]), one, atol=1e-9)
    assert float(regression.r_squared(fit.sums.mean(0))) == pytest.approx(expected, abs=1e-10)


def test_partial_r_squared_is_the_share_of_the_rest_and_undefined_where_nothing_is_left():
    sums = lambda error: np.array([error, 10.0, 10.0, 0.0])
    partial = lambda larger, smaller: regression.partial_r_squared(np.hstack([sums(larger), sums(smaller)]))
    assert partial(1.0, 2.0) == pytest.approx(0.5)
    assert np.isnan(partial(0.0, 0.0))


def test_the_score_of_a_model_is_that_of_its_context_vectors():
    subject = subject_of(untrained=False)
    finding = belief_geometry.analyse(subject, paths=100, points=9)
    tokens = subject.paths(100)
    folds = regression.Deal.of(tokens).folds(tokens).ravel()
    walk = jax.jit(jw.encoding_walk)
    context = np.concatenate([walk(subject.model, path).context for path in tokens]).astype(float)
    beliefs = np.concatenate([MESS3.beliefs(path)[1:] for path in tokens]).astype(float)
    assert finding.measured["r2"] == pytest.approx(held_out_fits(context, beliefs, folds)[1], abs=1e-4)


def test_belief_geometry():
    finding = belief_geometry.analyse(subject_of(), paths=200, points=81)
    holds(finding, "r2", "excess", "r2_best_station", "r2_all_stations", "partial_r2_log_law", "partial_r2_logits")
    nulls = {"untrained", "world_law", "world_log_law", "model_law", "model_logits", "last_token", "permuted"}
    assert nulls <= set(finding.null)
    assert finding.null["world_law"] == pytest.approx(1, abs=1e-6)
    assert finding.null["world_log_law"] == pytest.approx(0.993, abs=3e-3)
    assert finding.null["permuted"] < 0.1
    assert finding.measured["r2"] > finding.null["permuted"] + 0.3
    beyond, gained, steered = finding.primary
    assert "implied by low loss" in beyond.sentence
    assert "supported" not in (gained.decision, steered.decision)
    assert finding.figures[0].name == "beliefs"
    assert len(finding.arrays["words"]) == 81


def test_the_light_form_measures_the_same_r2():
    whole, light = (belief_geometry.analyse(subject_of(), paths=200, points=9, light=light) for light in (False, True))
    holds(light)
    assert set(light.measured) == {"r2"}
    assert light.measured["r2"] == whole.measured["r2"]
    assert light.null == {"last_token": whole.null["last_token"]}


def planted(data, model, *features):
    """A model's fits, as if its context vectors were the features, the last of them its logits."""
    rng = np.random.default_rng(0)
    width = model.width - sum(f.shape[-1] for f in features)
    context = np.concatenate([rng.normal(size=(*data.tokens.shape, width)), *features], axis=-1)
    V = features[-1].shape[-1]
    weight = jnp.concatenate([jnp.zeros((V, model.width - V)), jnp.eye(V)], axis=1)
    reads = dataclasses.replace(model, unembed=dataclasses.replace(model.unembed, weight=weight, bias=None))
    stations = np.repeat(context[:, None], model.stations, axis=1)
    return belief_geometry._fitted(reads, data, stations, context, features[-1])


def decisions(world, *planted_features):
    """The decisions on a model whose context vectors are these functions of (beliefs, log-laws), beside noise."""
    subject = subject_of(world, untrained=False)
    data = belief_geometry._data(subject, 400)
    log_laws = np.maximum(data.log_laws, -6)
    model = planted(data, subject.model, *(f(data.beliefs, log_laws) for f in planted_features))
    noise = planted(data, subject.model, np.random.default_rng(1).normal(size=log_laws.shape))
    nulls = {"last_token": model.fits["context"]} | belief_geometry._nulls(data, model, 0)
    quantities = belief_geometry._quantities(model, noise, nulls)
    steering = belief_geometry._steering(subject, model, noise, data)
    return [contrast.decision for contrast in belief_geometry._contrasts(quantities, *steering)]


def test_contexts_that_hold_beliefs_beyond_the_law_are_told_from_those_that_hold_the_law_only():
    belief, log_law = (lambda b, law: b), (lambda b, law: law)
    noise = lambda b, law: np.random.default_rng(2).normal(size=law.shape)
    rrxor = jw.worlds.make("rrxor")
    assert decisions(rrxor, belief, log_law)[:2] == ["supported", "supported"]
    assert decisions(rrxor, log_law)[:2] == ["contradicted", "supported"]
    assert decisions(rrxor, noise) == ["contradicted"] * 3
    assert decisions(MESS3, log_law) == ["not testable here", "supported", "supported"]
    # The belief is there, and the law does not follow from it.
    assert decisions(MESS3, belief, noise) == ["not testable here", "supported", "contradicted"]


def test_moves_end_where_the_map_reads_the_belief_and_random_ones_are_as_long():
    subject = subject_of(untrained=False)
    data = belief_geometry._data(subject, 64)
    model = belief_geometry._regress(subject.model, data, True)
    targets = data.beliefs[::-1]
    x, moved, *at_random = belief_geometry._moved(model, data.folds, targets, np.random.default_rng(0)).swapaxes(0, 1)
    np.testing.assert_allclose(regression.predict(model.fits["context"].maps, moved, data.folds), targets, atol=1e-6)
    for other in at_random:
        np.testing.assert_allclose(np.linalg.norm(other - x, axis=-1), np.linalg.norm(moved - x, axis=-1), rtol=1e-9)


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
    assert all(contrast.decision == "not testable here" for contrast in finding.primary[:2])


def test_untrained_models_are_several_of_one_shape():
    subject = subject_of()
    models = subject.untrained_models(3)
    assert models[0] is subject.untrained
    assert len({jax.tree.structure(model) for model in models}) == 1
    tables = [np.asarray(model.embed.table) for model in models]
    assert not np.allclose(tables[1], tables[2])
    np.testing.assert_array_equal(*(np.sort(table, axis=None) for table in tables[:2]))
    assert subject_of(untrained=False).untrained_models(3) == []


@pytest.mark.slow
def test_untrained_models_seldom_support_a_claim():
    contrasts = []
    for seed in range(20):
        models = (model_of(seed=s, vocab_size=3, max_length=8) for s in (seed, 100 + seed))
        subject = Subject(model=next(models), untrained=next(models), world=MESS3, seed=seed)
        for analysis, options in ((belief_geometry, {"points": 3}), (encoding_walk, {})):
            contrasts += analysis.analyse(subject, paths=64, **options).primary
    tested = [contrast for contrast in contrasts if contrast.decision != "not testable here"]
    assert len(tested) >= 60
    assert sum(contrast.decision == "supported" for contrast in tested) <= 0.05 * len(tested)
