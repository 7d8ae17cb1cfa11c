"""C5: the nearness of a context vector to the token vectors gives the conditional probability.

Claim: Singh, arXiv 2308.10874. The law is log p(v) = c.u_v + b_v - log Z, and c.u = |c|^2/2 + |u|^2/2 - |c - u|^2/2.
So the dot product explains the model's own law by construction where there is no output bias b, and distance does where
all |u| are alike, as in an untrained model: agreement of nearness with the model's own law is no evidence. What
training can bring about is that a context is near to the tokens that the *data* puts next. Therefore the law
q(v) = softmax_v(-|c - u_v|^2 / 2), which knows distances only, is scored by its loss on the tokens that follow.

Nulls: unigram frequencies, fitted on other data; distances from another path's context, from random vectors of equal
length, and to permuted output vectors; the untrained model. Beside the loss: the share of the variance of the model's
log p(v | context) over v, and agreement between the k nearest and the k most probable tokens. U is centred over v
first: one vector added to every u_v leaves the law alone and moves every distance.

Only the arrangement of vectors matters, not the axes: a rotation of the whole space leaves every law as it was.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.analyses._rotation import has_layer_norm, rotate
from jaxwalk.evidence.decision import Check, Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer

LOG_PROBS = 1 << 22
"""The most log-probabilities that are analysed."""
FEWEST_PATHS = 32
"""With a large vocabulary, fewer positions are measured rather than fewer paths than this."""
UNIGRAM_TOKENS = 1 << 17
"""The number of tokens that unigram frequencies are fitted on."""
DRAWS = 4
"""The number of draws of each sampled null, whose scores are averaged."""
KS = (1, 5, 10)
PREDICTORS = ("distance", "cosine", "dot", "norm", "unigram")
LABELS = {
    "unigram": "unigram frequencies",
    "other_context": "another path's context",
    "random_vector": "random vectors of equal length",
    "permuted_tokens": "permuted tokens",
    "untrained": "untrained model",
}
SMALLEST_GAIN = 0.05
"""In nats per token: a smaller gain changes probabilities by less than 5%."""
SHARE_KEPT = 0.9
"""Of the model's gain over unigram frequencies: nearness that loses more than a tenth is not the whole law."""
ROUNDING = 1e-3
"""In nats: the most that rounding changes a log-probability of a deep model in float32."""


def analyse(subject: Subject, *, paths: int = 256, positions: int = 15) -> Finding:
    """How much of what follows is given by the nearness of the context vector to the token vectors.

    Args:
        subject: the model and its data.
        paths: the most paths that are measured.
        positions: the most positions of a path that are measured. Both are lowered for a large vocabulary.
    """
    model, untrained, V = subject.model, subject.untrained, subject.model.vocab_size
    if V < 3:
        raise NotApplicable(f"with {V} tokens the law has a single log-odds, and any predictor explains it")
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")
    if subject.length < 2:
        raise NotApplicable("paths have one token, and none that follows")
    tokens, documents = subject.draw(min(paths, max(FEWEST_PATHS, LOG_PROBS // (V * positions))))
    n, T = tokens.shape
    first, last = min(1, T - 2), T - 2  # the token after the last position is not known
    count = max(1, min(positions, LOG_PROBS // (V * n), last - first + 1))
    at = np.unique(np.linspace(first, last, count).round().astype(np.int32))

    context, log_p = measure(contexts, model, tokens, shared=(at,))
    U, unigram, following = _centred(model), _unigram(subject), tokens[:, at + 1]
    runs = _runs(U, unigram, following, log_p, context, np.random.default_rng(subject.seed))
    if untrained is not None:
        own, law = measure(contexts, untrained, tokens, shared=(at,))
        runs["untrained"] = _score(_centred(untrained), unigram, following, law, own)
    loss, agreement, shares = _quantities(runs, V, documents)
    arrays, figures = _figures(shares, agreement, [k for k in KS if k < V])
    primary, kept = _primary(loss, runs[""], documents)
    checks, rotation = _checks(subject, tokens[:8], at, context, U)
    if model.unembed.bias is None and model.unembed.softcap is None:
        meaning = "without an output bias, the dot product explains all of the model's law"
        checks += (Check("share_dot_missing", 1 - shares.pop("share_dot").value, 1e-4, meaning),)
    return Finding(
        name="proximity",
        claim="C5: proximity of the context vector to the token vectors gives the conditional probability.",
        **numbers([loss, *kept, *shares.values(), *agreement.values()]),
        conventions=_conventions(subject, n, at) | rotation,
        arrays=arrays,
        figures=figures,
        primary=primary,
        checks=checks,
    )


# Measures.


def contexts(model: Transformer, path: Int[Array, " T"], at: Int[Array, " P"]) -> tuple[Array, Array]:
    """Context vectors [P, D] and log-probabilities [P, V] at the positions `at`."""
    context = model.contexts(path)[at]
    return context, jax.nn.log_softmax(jax.vmap(model.logits)(context))


def nearness(context: Float[Array, "P D"], U: Float[Array, "V D"]) -> dict[str, Float[Array, "P V"]]:
    """-|c - u|^2 / 2, cosine and dot product of contexts with every row of U: larger is nearer."""
    dot = context @ U.T
    c, u = jnp.linalg.norm(context, axis=-1, keepdims=True), jnp.linalg.norm(U, axis=-1)
    cosine = jnp.where(c * u > 0, dot / jnp.where(c * u > 0, c * u, 1), 0)
    return {"distance": dot - 0.5 * u**2 - 0.5 * c**2, "cosine": cosine, "dot": dot}


def scores(
    U: Float[Array, "V D"],
    following: Int[Array, " P"],
    log_p: Float[Array, "P V"],
    near: Float[Array, "P D"],
    unigram: Float[Array, " V"],
) -> dict[str, Array]:
    """What each of PREDICTORS says about a law and about the tokens that follow, in means over positions.

    Args:
        U: the output vectors.
        following: the token after each position.
        log_p: the law at each position.
        near: the vectors whose nearness to U predicts it.
        unigram: the logarithm of the frequency of each token.

    Returns:
        sums: [predictors, 3], of x log_p, x^2 and log_p^2, centred and summed over v. agreement: [predictors, ks], the
        share of the k tokens with the largest x that are among the k most probable. loss: [predictors], of the law
        softmax(x). model_loss: of the law itself.
    """
    V = len(U)
    alone = jnp.stack([jnp.broadcast_to(a, log_p.shape) for a in (0.5 * (U**2).sum(-1), unigram)])
    x = jnp.concatenate([jnp.stack(list(nearness(near, U).values())), alone])
    around, goal = x - x.mean(-1, keepdims=True), log_p - log_p.mean(-1, keepdims=True)
    products = ((around * goal).sum(-1), (around**2).sum(-1), jnp.broadcast_to((goal**2).sum(-1), x.shape[:-1]))
    most = min(max(KS), V - 1)
    nearest, likely = jax.lax.top_k(x, most)[1], jax.lax.top_k(log_p, most)[1]
    same = nearest[..., :, None] == likely[:, None, :]
    index = jnp.arange(len(following))
    return {
        "sums": jnp.stack(products, axis=-1).mean(1),
        "agreement": jnp.stack([same[..., :k, :k].any(-1).mean((-2, -1)) for k in KS if k < V], axis=-1),
        "loss": -jax.nn.log_softmax(x)[:, index, following].mean(-1),
        "model_loss": -log_p[index, following].mean(),
    }


def share(sums: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "..."]:
    """The share of variance explained with one slope for all contexts, negative where the slope is."""
    xy, xx, yy = np.moveaxis(np.asarray(sums), -1, 0)
    scale = xx * yy
    return np.divide(xy * np.abs(xy), scale, out=np.zeros_like(xy), where=scale > 0)


def identity_error(context: Float[np.ndarray, "N D"], U: Float[np.ndarray, "V D"]) -> float:
    """Largest error of c.u = |c|^2/2 + |u|^2/2 - |c-u|^2/2 in float64, relative to max(|c|^2, |u|^2)."""
    U = U.astype(np.float64)
    worst = 0.0
    for c in context[: max(1, (1 << 22) // U.size)]:
        square, squares = (c**2).sum(), (U**2).sum(-1)
        error = np.abs(U @ c - 0.5 * (square + squares - ((c - U) ** 2).sum(-1)))
        worst = max(worst, float((error / np.maximum(np.maximum(square, squares), 1e-300)).max()))
    return worst


def _centred(model: Transformer) -> Float[np.ndarray, "V D"]:
    """The output vectors without their mean."""
    U = np.asarray(model.output_vectors, float)
    return (U - U.mean(0)).astype(np.float32)


def _unigram(subject: Subject) -> Float[np.ndarray, " V"]:
    """The logarithm of the frequency of each token in other data, with one occurrence added to each."""
    T, V = subject.length, subject.model.vocab_size
    counts = np.bincount(subject.draw(max(FEWEST_PATHS, UNIGRAM_TOKENS // T), T, to_fit=True).tokens.ravel(), None, V)
    return np.log((counts + 1.0) / (counts.sum() + V)).astype(np.float32)


def _score(
    U: np.ndarray, unigram: np.ndarray, following: np.ndarray, log_p: np.ndarray, near: np.ndarray
) -> dict[str, np.ndarray]:
    """The `scores` of many paths."""
    return measure(scores, U, following, log_p.astype(np.float32), near.astype(np.float32), shared=(unigram,))


def _runs(
    U: np.ndarray, unigram: np.ndarray, following: np.ndarray, log_p: np.ndarray, context: np.ndarray, rng: Any
) -> dict[str, dict[str, np.ndarray]]:
    """The scores of the model (""), and of its nulls by name."""

    def scored(near: np.ndarray, vectors: np.ndarray = U) -> dict[str, np.ndarray]:
        return _score(vectors, unigram, following, log_p, near)

    def random() -> np.ndarray:
        vectors = rng.normal(size=context.shape)
        norms = np.linalg.norm(context, axis=-1, keepdims=True)
        return vectors * norms / np.linalg.norm(vectors, axis=-1, keepdims=True)

    def permuted() -> np.ndarray:
        cycle = rng.permutation(len(U))  # no token keeps its own vector
        return U[cycle[np.argsort(np.roll(cycle, 1))]]

    draws = {
        "random_vector": [scored(random()) for _ in range(DRAWS)],
        "permuted_tokens": [scored(context, permuted()) for _ in range(DRAWS)],
    }
    averages = {name: jax.tree.map(lambda *a: np.mean(a, axis=0), *each) for name, each in draws.items()}
    own = scored(context)
    alone = {name: np.repeat(own[name][:, -1:], len(PREDICTORS), axis=1) for name in ("sums", "agreement", "loss")}
    return {"": own, "unigram": alone, "other_context": scored(np.roll(context, 1, axis=0)), **averages}


# Quantities, decisions and checks.


def _quantities(
    runs: Mapping[str, Mapping[str, np.ndarray]], V: int, documents: np.ndarray
) -> tuple[Quantity, dict[str, Quantity], dict[str, Quantity]]:
    """The loss of the law that distances give; agreements, and shares, by name."""
    own, nulls = runs[""], {name: run for name, run in runs.items() if name}
    losses = {null: run["loss"][:, 0] for null, run in nulls.items()} | {"own_law": own["model_loss"]}
    loss = Quantity("loss_distance", own["loss"][:, 0], losses, "nats per token", documents=documents)
    agreement, shares = {}, {}
    for i, name in enumerate(PREDICTORS[:-1]):
        others = {null: run["sums"][:, i] for null, run in nulls.items() if name != "norm" or null == "unigram"}
        key = f"share_{name}"
        shares[key] = Quantity(key, own["sums"][:, i], others, "share of the variance", share, documents)
        for j, k in enumerate([k for k in KS if k < V] if name in ("distance", "cosine") else ()):
            chance = {null: run["agreement"][:, i, j] for null, run in nulls.items()} | {"chance": k / V}
            key = f"top{k}_{name}"
            agreement[key] = Quantity(key, own["agreement"][:, i, j], chance, "share of k tokens", documents=documents)
    return loss, agreement, shares


def _primary(
    loss: Quantity, own: Mapping[str, np.ndarray], documents: np.ndarray
) -> tuple[tuple[Contrast, ...], list[Quantity]]:
    """The contrasts, and the share of the model's gain that nearness keeps where there is a gain."""
    references = loss.references
    strongest = min(LABELS.keys() & references.keys(), key=lambda null: (references[null], null))
    first = loss.contrast(
        strongest,
        "C5",
        "distances from the context vector predict the tokens that follow",
        at_most=-SMALLEST_GAIN,
        label=LABELS[strongest],
    )
    unigram = own["loss"][:, -1]
    gains = np.stack([unigram - own["loss"][:, 0], unigram - own["model_loss"]], axis=-1)
    statement = f"distances alone keep {SHARE_KEPT:.0%} of what the model knows beyond the frequencies of tokens"
    whole = Quantity("gain", gains[:, 1], documents=documents).interval
    if whole is None or whole[0] < SMALLEST_GAIN:
        reason = f"the model gains no {SMALLEST_GAIN} nats per token over unigram frequencies, of which to keep a share"
        return (first, untestable("C5", statement, "gain_share", reason)), []
    kept = Quantity(
        "gain_share",
        gains,
        {"unigram": 0.0},
        "share of the gain",
        lambda means: means[..., 0] / means[..., 1],
        documents,
    )
    return (first, kept.contrast("unigram", "C5", statement, at_least=SHARE_KEPT, label=LABELS["unigram"])), [kept]


def _checks(
    subject: Subject, tokens: np.ndarray, at: np.ndarray, context: np.ndarray, U: np.ndarray
) -> tuple[tuple[Check, ...], dict[str, Any]]:
    """What holds by construction, and how the rotation was made."""
    model, vectors = subject.model, context.reshape(-1, context.shape[-1])[:64]
    identity = Check("identity_error", identity_error(vectors, U), 1e-12, "c.u = |c|^2/2 + |u|^2/2 - |c - u|^2/2")
    try:
        rotated = rotate(model, jax.random.key(subject.seed))
    except NotApplicable as reason:
        return (identity,), {"rotation": f"not measured: {reason}"}
    models = (model, rotated, dataclasses.replace(rotated, embed=model.embed))
    laws = [measure(contexts, m, tokens, shared=(at,))[1] for m in models]
    change, left = (float(np.abs(law - laws[0]).max()) for law in laws[1:])
    check = Check("rotation_change", change, ROUNDING, "a rotation of the whole space changes no log-probability")
    return (identity, check), {
        "rotation": f"of the stream's space, at random, and of every map into and out of it, over {len(tokens)} paths"
        + ("; with LayerNorm the rotation fixes the all-ones vector" if has_layer_norm(model) else "")
        + f". If the token vectors are left as they are, log-probabilities change by up to {left:.3g} nats"
    }


def _conventions(subject: Subject, n: int, at: np.ndarray) -> dict[str, Any]:
    return {
        "loss_distance": "of the law softmax(-|c - u|^2 / 2) on the tokens that follow; own_law: of the model's law",
        "share": (
            "share of the variance of log p(v | context) over v, both sides centred over v, that b x explains with one "
            "slope b for all contexts (a slope for each would let a random vector explain 1/(V-1)); negative where b is"
        ),
        "norm": "|u|^2 / 2 alone, which knows nothing of the context",
        "centring": "the mean of U over v is subtracted from every u_v; c is left as it is, after the final norm",
        "random_vector, permuted_tokens": f"means of {DRAWS} draws",
        "unigram": "log(1 + count) in other data, as the only predictor",
        "untrained": "its own vectors against its own law; its loss is that of the same tokens"
        if subject.untrained is not None
        else "not available: this model has no step 0",
        "contexts": f"{len(at)} of positions {at[0]} to {at[-1]}, evenly spaced, of {n} paths",
    }


def _figures(
    shares: Mapping[str, Quantity], agreement: Mapping[str, Quantity], ks: list[int]
) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    names = [name for name in PREDICTORS if name != "unigram"]
    whole = [shares[f"share_{name}"] for name in names]
    nulls = [null for null in LABELS if null in whole[0].references]
    ends = np.array([q.interval or (q.value, q.value) for q in whole])
    arrays = {
        "predictor": np.array(names),
        "k": np.array(ks),
        "explained": np.array([q.value for q in whole]),
        "explained_low": ends[:, 0],
        "explained_high": ends[:, 1],
    }
    bars = [Series("this model", "explained", "predictor", "bars", "explained_low", "explained_high")]
    lines = []
    for name in ("distance", "cosine"):
        arrays[f"agreement_{name}"] = np.array([agreement[f"top{k}_{name}"].value for k in ks])
        lines.append(Series(f"nearest by {name}", f"agreement_{name}", "k"))
    for null in nulls:
        arrays[f"explained_{null}"] = np.array([q.references.get(null, np.nan) for q in whole])
        bars.append(Series(LABELS[null], f"explained_{null}", "predictor", "bars", dashed=True))
        arrays[f"agreement_{null}"] = np.array([agreement[f"top{k}_distance"].references[null] for k in ks])
        lines.append(Series(LABELS[null], f"agreement_{null}", "k", dashed=True))
    title = "What explains the model's own log-probabilities"
    explained = Figure("explained", title, "predictor", "share of the variance over v", tuple(bars))
    title = "Agreement of the k nearest tokens with the k most probable"
    agreeing = Figure("agreement", title, "k", "share in common", tuple(lines), log_x=True)
    return arrays, (explained, agreeing) if len(ks) > 1 else (explained,)
