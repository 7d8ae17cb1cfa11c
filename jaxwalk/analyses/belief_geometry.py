"""C8: the context vector is the composed concept. In a world, the concept is the observer's belief state.

Claim: Singh, arXiv 2308.10874. Measure: an affine map from context vectors to the world's belief states, fitted by
least squares and scored by R^2 on held-out prefixes (Shai et al., arXiv 2405.15943; their picture opens the report).

An R^2 alone shows little. Random features of a short context hold most of its belief, so R^2 is compared with the best
of several untrained models. And logits are affine in the context vector, so that any model of low loss holds the
world's log-law: where the belief is nearly an affine function of that law, as in Mess3, its R^2 is implied by low loss,
and only what the context adds to the law says more. The causal test moves a context vector to where the map reads
another belief, and compares the model's law there with the world's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import special

from jaxwalk.analyses._belief_picture import by_station, picture
from jaxwalk.evidence.decision import Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import Finding, NotApplicable
from jaxwalk.evidence.regression import (
    FOLDS,
    RIDGES,
    Deal,
    Fit,
    cross_fit,
    partial_r_squared,
    patterns,
    predict,
    r_squared,
)
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.worlds import HiddenMarkov

FIRST = True
FLOATS = 1 << 27
"""How many numbers the walks of all paths may take: long paths of large models are fewer."""
WIDEST = 1024
"""The most features that are regressed on at once: the fit needs the square of it in memory."""
LOWEST_LOG = -20.0
"""Log-probabilities are clipped here: in float32 smaller probabilities are rounding."""
UNTRAINED = 4
"""How many untrained models there are: one initialisation is one draw, and the best of them is the null."""
MARGIN = 0.05
"""The smallest difference in R^2 that matters: about as much as R^2 differs between initialisations."""
STEERED = 0.5
"""The smallest share of the divergence that matters: a move to a belief should remove more of it than it leaves."""
DIRECTIONS = 4
"""The number of random directions that a context vector is moved in; the best of them is the null."""
STEERED_PATHS = 256
INFORMATIVE = 0.01
"""How many nats the belief must tell of the next token, for moves between beliefs to have an effect to measure."""

CLAIM = "C8: a context vector is the composed concept: an affine image of it is the world's belief state."


def analyse(subject: Subject, *, paths: int = 1024, points: int = 6561, light: bool = False) -> Finding:
    """How much of the world's belief state is an affine function of the context vectors, and of each station.

    Args:
        subject: a model of a hidden Markov world.
        paths: the number of sampled paths that the maps are fitted to and scored on.
        points: the most points in the picture.
        light: whether to measure only the R^2 of the context vectors, and that of the last token.
    """
    data = _data(subject, paths)
    model = _regress(subject.model, data, light)
    last_token = data.fit(np.eye(subject.world.vocab_size)[data.tokens])
    if light:
        r2 = Quantity("r2", model.fits["context"].sums, {"last_token": last_token.sums}, "R²", r_squared)
        return Finding(
            name="belief_geometry",
            claim=CLAIM,
            **numbers([r2]),
            conventions=_conventions(data),
            verdict=f"R² of the belief is {r2.value:.4f} from context vectors, "
            f"{r2.references['last_token']:.4f} from the last token.",
        )
    nulls = {"last_token": last_token, **_nulls(data, model, subject.seed)}
    every_untrained = [_regress(fresh, data, True) for fresh in subject.untrained_models(UNTRAINED)]
    best = max(every_untrained, key=lambda regressed: regressed.r2, default=None)
    untrained = None if best is None else _regress(best.model, data, False)
    quantities = _quantities(model, untrained, nulls)
    steering, reason = _steering(subject, model, untrained, data)
    shown = {"trained": model} | ({} if untrained is None else {"untrained": untrained})
    references = {"context vector": model.r2, "last token alone": _r2(last_token)}
    arrays, station_figure = by_station({name: each.stations for name, each in shown.items()}, references)
    panels = {name: (each.model, each.fits["context"].maps, each.r2) for name, each in shown.items()}
    beliefs, beliefs_figure, convention = picture(subject.world, panels, data.deal, data.beliefs, points)
    conventions = _conventions(data) | _more_conventions(every_untrained) | {"picture": convention}
    if "all_stations" not in model.fits:
        conventions["all_stations"] = f"not fitted: there are more than {WIDEST} features"
    return Finding(
        name="belief_geometry",
        claim=CLAIM,
        **numbers([q for q in (*quantities, steering) if q is not None and np.isfinite(q.value)]),
        conventions=conventions,
        arrays=arrays | beliefs,
        figures=(beliefs_figure, station_figure),
        primary=_contrasts(quantities, steering, reason),
    )


class Data(NamedTuple):
    """Paths, and what an observer who knows the world believes and expects after each of their prefixes.

    Attributes:
        tokens: [n, T].
        beliefs: [n, T, N].
        log_laws: [n, T, V], the log-probabilities of the next token.
        deal: which fold each prefix is in.
        folds: [n, T].
    """

    tokens: Int[np.ndarray, "n T"]
    beliefs: Float[np.ndarray, "n T N"]
    log_laws: Float[np.ndarray, "n T V"]
    deal: Deal
    folds: Int[np.ndarray, "n T"]

    def fit(self, features: Float[np.ndarray, "n T F"], beliefs: Float[np.ndarray, "n T N"] | None = None) -> Fit:
        """The cross-fitted map from features to the beliefs."""
        return cross_fit(features, self.beliefs if beliefs is None else beliefs, self.folds)


class Regressed(NamedTuple):
    """The maps from a model's vectors to the beliefs.

    Attributes:
        model: the model.
        vectors: [n, T, D], the context vectors.
        fits: the cross-fitted maps, by the name of their features: "context" (the context vectors), "law" and "logits"
            (the model's own), "with_law" (context vectors, and the world's law and log-law), "with_log_law" (without
            the law), "station_0" and so on, "best_station", and "all_stations" together, where they are not too wide.
    """

    model: Transformer
    vectors: Float[np.ndarray, "n T D"]
    fits: Mapping[str, Fit]

    @property
    def r2(self) -> float:
        """R^2 of the context vectors."""
        return _r2(self.fits["context"])

    @property
    def stations(self) -> list[Fit]:
        """The fits of each station."""
        return [self.fits[f"station_{s}"] for s in range(self.model.stations)]


def _r2(fit: Fit) -> float:
    return float(r_squared(fit.sums.mean(axis=0)))


def _data(subject: Subject, paths: int) -> Data:
    world, model = subject.world, subject.model
    if world is None:
        raise NotApplicable("the data has no world, so no belief states are known")
    if not isinstance(world, HiddenMarkov):
        raise NotApplicable("the world has no belief states: only hidden Markov worlds do")
    walk = model.stations * subject.length * model.width
    tokens = subject.paths(min(paths, max(64, FLOATS // walk)))
    beliefs, log_laws = measure(_truth, world, tokens)
    if np.ptp(beliefs.reshape(-1, beliefs.shape[-1]), axis=0).max() < 1e-6:
        raise NotApplicable("the observer of this world has the same belief after every path")
    deal = Deal.of(tokens)
    return Data(tokens, beliefs, log_laws, deal, deal.folds(tokens))


def _regress(model: Transformer, data: Data, context_only: bool) -> Regressed:
    """The maps from a model's vectors to the beliefs; only that from the context vectors if `context_only`."""
    return _fitted(model, data, *measure(_walks, model, data.tokens), context_only=context_only)


def _fitted(
    model: Transformer,
    data: Data,
    stations: Float[np.ndarray, "n S T D"],
    context: Float[np.ndarray, "n T D"],
    logits: Float[np.ndarray, "n T V"],
    *,
    context_only: bool = False,
) -> Regressed:
    """The maps from these vectors of a model to the beliefs."""
    if context_only:
        return Regressed(model, context, {"context": data.fit(context)})
    n, S, T, D = stations.shape
    log_law = _log_features(data.log_laws)
    features = {
        "context": context,
        "law": special.softmax(logits, axis=-1),
        "logits": logits,
        "with_law": np.concatenate([context, log_law, np.exp(data.log_laws)], axis=-1),
        "with_log_law": np.concatenate([context, log_law], axis=-1),
        **{f"station_{s}": stations[:, s] for s in range(S)},
    }
    if S * D <= WIDEST:
        features["all_stations"] = stations.swapaxes(1, 2).reshape(n, T, S * D)
    fits = {name: data.fit(x) for name, x in features.items()}
    fits["best_station"] = max((fits[f"station_{s}"] for s in range(S)), key=_r2)
    return Regressed(model, context, fits)


def _nulls(data: Data, model: Regressed, seed: int) -> dict[str, Fit]:
    """The fits to the world's law after each prefix, and that of context vectors to the beliefs of other paths."""
    laws, log_laws = np.exp(data.log_laws), _log_features(data.log_laws)
    return {
        "permuted": data.fit(model.vectors, np.random.default_rng(seed).permutation(data.beliefs)),
        "world_law": data.fit(laws),
        "world_log_law": data.fit(log_laws),
        "world_law_and_log_law": data.fit(np.concatenate([log_laws, laws], axis=-1)),
    }


def _truth(world: HiddenMarkov, path: Int[Array, " T"]) -> tuple[Array, Array]:
    """The observer's beliefs [T, N] and next-token log-probabilities [T, V], each after the token at the position."""
    return world.beliefs(path)[1:], world.next_log_probs(path)[1:]


def _walks(model: Transformer, path: Int[Array, " T"]) -> tuple[Array, Array, Array]:
    """Stations [S, T, D], context vectors [T, D] and logits [T, V]."""
    walk = model.walk(path)
    return walk.stations, walk.context, jax.vmap(model.logits)(walk.context)


def _log_features(log_laws: Float[np.ndarray, "n T V"]) -> Float[np.ndarray, "n T F"]:
    """Log-probabilities, 0 where a token is forbidden, and indicators of the forbidden tokens."""
    forbidden = np.isneginf(log_laws)
    return np.concatenate([np.where(forbidden, 0, np.maximum(log_laws, LOWEST_LOG)), forbidden], axis=-1)


# What is measured, and what it decides.


def _quantities(model: Regressed, untrained: Regressed | None, nulls: Mapping[str, Fit]) -> tuple[Quantity, ...]:
    """R^2 of the context vectors, alone and beside the world's law, and of stations."""
    others = {} if untrained is None else untrained.fits

    def r2(name: str, features: str, **fits: Fit) -> Quantity:
        fits |= {"untrained": others[features]} if others else {}
        sums = {null: fit.sums for null, fit in fits.items()}
        return Quantity(name, model.fits[features].sums, sums, "R²", r_squared)

    def partial(name: str, features: str, smaller: Fit, larger_nulls: Mapping[str, Fit]) -> Quantity:
        pairs = {null: np.hstack([fit.sums, smaller.sums]) for null, fit in larger_nulls.items()}
        columns = np.hstack([model.fits[features].sums, smaller.sums])
        return Quantity(name, columns, pairs, "partial R²", partial_r_squared)

    own = {"model_law": model.fits["law"], "model_logits": model.fits["logits"]}
    beside_law = {"untrained": others["with_log_law"]} if others else {}
    quantities = [
        r2("r2", "context", **own, **nulls),
        r2("r2_with_law", "with_law", world_law=nulls["world_law_and_log_law"]),
        partial("partial_r2_log_law", "with_log_law", nulls["world_log_law"], beside_law),
        partial("partial_r2_logits", "context", model.fits["logits"], {}),
        r2("r2_best_station", "best_station"),
    ]
    if "all_stations" in model.fits:
        quantities.append(r2("r2_all_stations", "all_stations"))
    if others:
        quantities.append(partial("excess", "context", others["context"], {}))
    return tuple(quantities)


def _contrasts(quantities: Sequence[Quantity], steering: Quantity | None, reason: str) -> tuple[Contrast, ...]:
    """What the claim predicts of R^2, of R^2 beside the world's law, and of moves to other beliefs."""
    r2, with_law = quantities[:2]

    def against(quantity: Quantity, nulls: Sequence[str], statement: str, implied: str) -> Contrast:
        if "untrained" not in quantity.nulls:
            return untestable("C8", statement, quantity.name, "there is no untrained model")
        null = max(nulls, key=quantity.references.__getitem__)
        best = quantity.references[null]
        if best > 1 - MARGIN:
            return untestable("C8", statement, quantity.name, implied.format(best))
        labels = {"untrained": f"the best of {UNTRAINED} untrained models", "world_law": "the world's law alone"}
        return quantity.contrast(null, "C8", statement, at_least=MARGIN, label=labels[null])

    law = max(value for name, value in r2.references.items() if name.startswith("world_"))
    beyond = against(
        with_law,
        ("world_law", "untrained"),
        "context vectors hold more of the belief than the world's exact next-token law implies",
        f"the belief is implied by low loss, as the exact next-token law alone holds it with R² {law:.3f}"
        if law > 1 - MARGIN
        else "an untrained model and the exact next-token law hold the belief with R² {:.3f}",
    )
    gained = against(
        r2,
        ("untrained",),
        "context vectors hold the belief better than those of untrained models",
        "an untrained model holds the belief with R² {:.3f}",
    )
    statement = "a context vector moved to another belief predicts what the world does at that belief"
    if steering is None:
        return beyond, gained, untestable("C8", statement, "steering", reason)
    null = max(steering.references, key=steering.references.__getitem__)
    return beyond, gained, steering.contrast(null, "C8", statement, at_least=STEERED)


# Moves between beliefs.


def _steering(
    subject: Subject, model: Regressed, untrained: Regressed | None, data: Data
) -> tuple[Quantity | None, str]:
    """How much closer to the world's law at another belief a move to it brings the model's law; or why not measured."""
    if model.model.vocab_size != subject.world.vocab_size:
        return None, "the model has other tokens than the world"
    n, T, D = model.vectors.shape
    n = min(n, STEERED_PATHS, max(16, FLOATS // (8 * (2 + DIRECTIONS) * T * D)))
    beliefs, log_laws = measure(_truth, subject.world, subject.draw(len(data.tokens), T, to_fit=True).tokens[:n])
    laws = np.exp(log_laws)
    mean = laws.mean(axis=0, keepdims=True)
    told = np.where(laws > 0, laws * (np.where(laws > 0, log_laws, 0) - np.log(np.where(mean > 0, mean, 1))), 0)
    if told.sum(-1).mean() < INFORMATIVE:
        return None, f"the belief tells less than {INFORMATIVE} nat of the next token, and a move to another no more"

    def shares(regressed: Regressed) -> list[np.ndarray]:
        """For each move, KL(world at the target || model), [n] moved and as it was."""
        vectors = _moved(regressed, data.folds[:n], beliefs, np.random.default_rng(subject.seed))
        still, *moved = measure(
            _divergences, regressed.model, vectors.astype(np.float32), log_laws.astype(np.float32)
        ).T
        return [np.stack([kl, still], axis=1) for kl in moved]

    to_belief, *at_random = shares(model)
    random = max(at_random, key=lambda columns: _removed(columns.mean(axis=0)))
    nulls: dict[str, Any] = {"unmoved": 0.0, "random_direction": random}
    if untrained is not None:
        nulls["untrained"] = shares(untrained)[0]
    return Quantity("steering", to_belief, nulls, "share of KL(world at the belief || model) removed", _removed), ""


def _removed(means: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "..."]:
    """The share of the divergence before a move that is gone after it, from the means of both."""
    return np.asarray(1 - means[..., 0] / means[..., 1])


def _moved(
    regressed: Regressed, folds: Int[np.ndarray, "n T"], beliefs: Float[np.ndarray, "n T N"], rng: np.random.Generator
) -> Float[np.ndarray, "n K T D"]:
    """Context vectors as they are, moved to where the map reads other beliefs, and moved in random directions.

    Random directions are drawn from the covariance of the context vectors, and are as long as the move.
    """
    maps, x = regressed.fits["context"].maps, regressed.vectors[: len(folds)]
    covariance = np.cov(regressed.vectors.reshape(-1, x.shape[-1]), rowvar=False)
    change = predict(patterns(maps, covariance), beliefs - predict(maps, x, folds), folds)
    moved = [x, x + change]
    root = np.linalg.cholesky(covariance + (1e-9 * np.trace(covariance) + 1e-300) * np.eye(len(covariance)))
    for _ in range(DIRECTIONS):
        direction = rng.normal(size=x.shape) @ root.T
        size = np.linalg.norm(change, axis=-1, keepdims=True) / np.linalg.norm(direction, axis=-1, keepdims=True)
        moved.append(x + size * direction)
    return np.stack(moved, axis=1)


def _divergences(model: Transformer, vectors: Float[Array, "K T D"], log_laws: Float[Array, "T V"]) -> Array:
    """KL(world || model), [K] nats, of the laws that the model reads from vectors, mean over positions."""
    log_p = jax.nn.log_softmax(jax.vmap(jax.vmap(model.logits))(vectors), axis=-1)
    p = jnp.exp(log_laws)
    return jnp.where(p > 0, p * (log_laws - log_p), 0).sum(-1).mean(-1)


# Figures and conventions.


def _conventions(data: Data) -> dict[str, Any]:
    return {
        "r2": "1 - squared error / variance, both summed over the belief's coordinates; at most 1, unbounded below",
        "held_out": (
            f"{FOLDS} folds of prefixes: each prefix is predicted by the map fitted to the other folds. Distinct "
            f"prefixes are dealt to the folds in hashed order, from length {data.deal.fork} on together with their "
            f"first {data.deal.fork} tokens, so that no prefix, and no path beyond its first tokens, is on both sides"
        ),
        "weighting": "a prefix counts as often as it was sampled, all positions alike",
        "fit": (
            f"least squares with intercept, in float64, with a ridge of {RIDGES[0]:g} to {RIDGES[-1]:g} of the whole "
            "variance, chosen within the folds that are fitted to: the one that predicts each from the others"
        ),
        "interval": "95%, over paths with the maps as fitted",
        "paths": data.tokens.shape[0],
        "length": data.tokens.shape[1],
        "belief": "after the tokens up to and including the position",
        "context": "after the final norm; stations before it",
    }


def _more_conventions(untrained: Sequence[Regressed]) -> dict[str, Any]:
    each = ", ".join(f"{regressed.r2:.3f}" for regressed in untrained)
    return {
        "untrained": f"the best of {len(untrained)} initialisations, whose R² are {each}" if untrained else "none",
        "excess": "(r2 - untrained) / (1 - untrained); left out where the untrained model leaves nothing to gain",
        "r2_best_station": "chosen by the R² that is reported; its null is chosen likewise",
        "world_law, world_log_law": "R² of the world's exact next-token probabilities, and of their logarithms with "
        f"indicators of the forbidden tokens; logarithms are clipped at {LOWEST_LOG:g}",
        "model_law, model_logits": "R² of the model's own next-token probabilities, and of its logits",
        "r2_with_law": "of context vectors, probabilities and log-probabilities of the world together; its null "
        "world_law: of the latter two",
        "partial_r2_log_law": "share of what world_log_law leaves unexplained that context vectors explain beside it",
        "partial_r2_logits": "share of what model_logits leave unexplained that context vectors explain",
        "permuted": "contexts of one path with beliefs of another",
        "steering": "context vectors are moved to the belief after the same number of tokens of another path, by the "
        "least change in the metric of their covariance; random directions are as long, and the best of "
        f"{DIRECTIONS} counts",
    }
