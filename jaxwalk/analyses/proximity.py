"""C5: the nearness of a context vector to the token vectors gives the conditional probability.

Claim: Singh, arXiv 2308.10874. The law is log p(v) = c.u_v + b_v - log Z, and c.u = |c|^2/2 + |u|^2/2 - |c - u|^2/2:
so the dot product explains everything by construction where there is no output bias b, which is no evidence. What can
be asked is how much is left of it when it is read as nearness: by cosine, by distance, or by the norm |u| alone.
Measures: share of the variance of log p(v | context) over v, and agreement between the k nearest and the k most
probable tokens. U is centred over v first: one vector added to every u_v leaves the law alone and moves every distance.

Rank correlation over the whole vocabulary is reported too and is *no* evidence where norms differ: on a real model
a random vector of equal length scored 0.98 and the real context 0.94. Nulls: such a random vector, another path's
context, permuted tokens, the untrained model, unigram log-frequency.

Only the arrangement of vectors matters, not the axes: `rotate` turns the whole space and leaves every law as it was.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import batches, percentiles, resampled_means
from jaxwalk.evidence.subject import Subject
from jaxwalk.filters import Embed, LayerNorm, LearnedPositions, Linear, Norm, SinusoidalPositions, Unembed
from jaxwalk.model import Layer, Layers, Transformer

FLOATS = 1 << 20
"""How many log-probabilities are analysed in all: ranking them is what takes time."""
BATCH = 1 << 22
"""How many numbers a batch may hold."""
KS = (1, 5, 10)
NEARNESS = ("dot", "cosine", "distance")
LABELS = {
    "random_vector": "random vector of equal length",
    "other_context": "another path's context",
    "permuted_tokens": "permuted tokens",
    "untrained": "untrained model",
    "unigram": "unigram log-frequency",
}


def analyse(subject: Subject, *, paths: int = 256, positions: int = 15) -> Finding:
    """How much of the law over next tokens is nearness of the context vector to the token vectors.

    positions: the most positions of a path that are measured; both are lowered for a large vocabulary.
    """
    model = subject.model
    V = model.vocab_size
    if V < 3:
        raise NotApplicable(f"with {V} tokens the law has a single log-odds, and any predictor explains it")
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")
    positions = max(1, min(positions, FLOATS // (V * paths)))
    tokens = subject.paths(max(8, min(paths, FLOATS // V)))
    n, T = tokens.shape
    at = np.unique(np.linspace(min(1, T - 1), T - 1, min(positions, max(T - 1, 1))).round().astype(int))
    size = BATCH // max(len(at) * V, (2 * model.depth + 1) * T * model.width)
    size = max(2, min(128, n, size))  # two, so that there is another path
    ks = tuple(k for k in KS if k < V)
    rng = np.random.default_rng(subject.seed)
    cycle = rng.permutation(V)
    permutation = np.empty(V, int)
    permutation[cycle] = np.roll(cycle, 1)  # no token keeps its own vector
    frequency = np.log(np.bincount(tokens.ravel(), minlength=V) + 1.0)

    scores: dict[str, list[np.ndarray]] = {}
    identity = 0.0

    def add(null: str, context: np.ndarray, U: np.ndarray, law: Law) -> None:
        # Per path: what each nearness of `context` to the rows of U says about the law.
        for name, x in nearness(context, U).items():
            scores.setdefault(f"{name}.{null}", []).append(score(x, law))

    def run(model: Transformer, prefix: str) -> None:
        nonlocal identity
        U = np.asarray(model.output_vectors, float)
        U = U - U.mean(0)
        norm = np.broadcast_to(0.5 * (U**2).sum(-1), (1, 1, V))
        before: np.ndarray | None = None
        for batch, count in batches(tokens, size):
            context, log_p = (np.asarray(a[:count], float) for a in _contexts(model, batch, at))
            if not np.isfinite(context).all():
                raise NotApplicable("context vectors: expected finite numbers, got NaN. Analyse an earlier step.")
            law = Law.of(log_p, ks)
            add(prefix, context, U, law)
            if prefix:
                continue
            identity = max(identity, identity_error(context.reshape(-1, context.shape[-1])[:64], U))
            scores.setdefault("norm.", []).append(score(np.broadcast_to(norm, log_p.shape), law))
            scores.setdefault("unigram", []).append(score(np.broadcast_to(frequency, log_p.shape), law))
            random = rng.normal(size=context.shape)
            random *= np.linalg.norm(context, axis=-1, keepdims=True) / np.linalg.norm(random, axis=-1, keepdims=True)
            add("random_vector", random, U, law)
            add("permuted_tokens", context, U[permutation], law)
            before = context[-1:] if before is None else before
            add("other_context", np.concatenate([before, context[:-1]]), U, law)
            before = context[-1:]

    run(model, "")
    if subject.untrained is not None:
        run(subject.untrained, "untrained")
    per_path = {name: np.concatenate(parts) for name, parts in scores.items()}
    summary = {name: summarise(s.mean(0)) for name, s in per_path.items()}
    names = (*NEARNESS, "norm")
    draws = summarise(resampled_means(np.stack([per_path[f"{name}."] for name in names], axis=1), subject.seed))
    ends = dict(zip(names, np.stack(percentiles(draws)).swapaxes(0, 1), strict=True))  # name -> [2, columns]
    nulls = [null for null in LABELS if null == "unigram" or f"distance.{null}" in summary]

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    columns = ["share", "spearman", *(f"top{k}" for k in ks)]
    for name in ("distance", "cosine", "dot", "norm"):
        low, high = ends[name]
        for c, what in enumerate(columns):
            if (name == "dot" and what != "share") or (name == "norm" and c > 1):
                continue
            key = f"{what}_{name}"
            measured[key] = float(summary[f"{name}."][c])
            interval[key] = (float(low[c]), float(high[c]))
            if name == "norm":
                continue
            for other in nulls:
                source = "unigram" if other == "unigram" else f"{name}.{other}"
                null[f"{key}.{other}"] = float(summary[source][c])
    for c, k in enumerate(ks, 2):
        null[f"{columns[c]}_distance.chance"] = null[f"{columns[c]}_cosine.chance"] = k / V
    by_construction = model.unembed.bias is None and model.unembed.softcap is None
    if by_construction:
        null["share_dot.by_construction"] = 1.0
    measured["identity_error"] = identity
    null["identity_error.exact"] = 0.0

    conventions: dict[str, Any] = {
        "share": (
            "share of the variance of log p(v | context) over v, both sides centred over v, that b x explains with one "
            "slope b for all contexts (a slope for each would let a random vector explain 1/(V-1)); negative where b is"
        ),
        "dot": (
            "explains everything by construction, as there is no output bias: no evidence"
            if by_construction
            else "not 1 by construction: there is an output bias, or a soft cap of the logits"
        ),
        "distance": "-|c - u|^2 / 2: over v it differs from the dot product by |u|^2 / 2 alone, in every context alike",
        "other_context": "what it explains as well is how frequent tokens are, not what the context says",
        "norm": "|u|^2 / 2 alone, which knows nothing of the context",
        "centring": "the mean of U over v is subtracted from every u_v; c is left as it is",
        "context": "after the final norm",
        "top_k": f"share of the k nearest tokens that are among the k most probable, k of {KS} below V",
        "spearman": (
            "mean over contexts of the rank correlation over the whole vocabulary: no evidence where token norms "
            "differ, as a random vector of equal length may score as much; read the top-k agreement"
        ),
        "identity_error": "largest error of c.u = |c|^2/2 + |u|^2/2 - |c-u|^2/2, over max(|c|^2, |u|^2), in float64",
        "unigram": "log(1 + count) in the paths that are analysed, as the only predictor",
        "untrained": "its own vectors against its own law"
        if subject.untrained is not None
        else "not available: this model has no step 0",
        "contexts": f"{len(at)} of positions {at[0]} to {at[-1]}, evenly spaced, of {n} paths",
        "nulls": "of the measured number before the dot",
        "intervals": "95%, bootstrap over paths",
        "units": "agreement from 0 to 1, shares from -1 to 1; log-probabilities in nats",
    }

    # Rotation of the whole space.
    said = ""
    few = tokens[:size]

    def change(other: Transformer) -> float:
        before, after = (np.asarray(_contexts(m, few, at)[1]) for m in (model, other))
        return float(np.abs(after - before).max())

    try:
        rotated = rotate(model, jax.random.key(subject.seed))
    except NotApplicable as reason:
        conventions["rotation"] = f"not measured: {reason}"
    else:
        measured["rotation_change"] = change(rotated)
        null["rotation_change.exact"] = 0.0
        null["rotation_change.token_vectors_left"] = change(dataclasses.replace(rotated, embed=model.embed))
        conventions["rotation"] = (
            f"largest change of a log-probability, in nats, over {len(few)} paths, when the space of the stream is "
            "rotated at random and every map into and out of it with it, scales and biases of norms folded into the "
            "maps that follow"
            + ("; with LayerNorm the rotation fixes the all-ones vector" if _layer_norm(model) else "")
            + (
                "; the tied output vectors become their own"
                if model.unembed.weight is None and rotated.unembed.weight is not None
                else ""
            )
            + "; token_vectors_left: everything rotated but the token vectors"
        )
        said = (
            f" Rotating the whole space changes no log-probability by more than {measured['rotation_change']:.1e} "
            f"({null['rotation_change.token_vectors_left']:.2f} if the token vectors are left)."
        )

    arrays: dict[str, np.ndarray] = {"predictor": np.array(names), "k": np.array(ks)}

    def bars(what: str, column: int = 0) -> tuple[Series, ...]:
        arrays[what] = np.array([summary[f"{name}."][column] for name in names])
        arrays[f"{what}_low"], arrays[f"{what}_high"] = np.array([ends[name][:, column] for name in names]).T
        series = [Series("this model", what, "predictor", style="bars", low=f"{what}_low", high=f"{what}_high")]
        for other in nulls:
            if other == "unigram":
                continue
            arrays[f"{what}_{other}"] = np.array(
                [summary[f"{name}.{other}"][column] if name in NEARNESS else np.nan for name in names]
            )
            series.append(Series(LABELS[other], f"{what}_{other}", "predictor", style="bars", dashed=True))
        return tuple(series)

    figures = [
        Figure(
            "explained",
            "What explains the log-probability of tokens"
            + (" (the dot product does by construction; the question is what nearness keeps of it)" * by_construction),
            "predictor",
            "share of the variance over v",
            bars("explained"),
            references={"unigram log-frequency": float(summary["unigram"][0])},
        )
    ]
    if len(ks) > 1:
        series = []
        for name in ("distance", "cosine"):
            arrays[f"agreement_{name}"] = summary[f"{name}."][2:]
            series.append(Series(f"nearest by {name}", f"agreement_{name}", "k"))
        for other in nulls:
            source = "unigram" if other == "unigram" else f"distance.{other}"
            arrays[f"agreement_{other}"] = summary[source][2:]
            series.append(Series(LABELS[other], f"agreement_{other}", "k", dashed=True))
        title = "Agreement of the k nearest tokens with the k most probable"
        figures.append(Figure("agreement", title, "k", "share in common", tuple(series), log_x=True))

    k = ks[0]
    beside = f", untrained {null[f'top{k}_distance.untrained']:.1%}" if subject.untrained is not None else ""
    share = f", untrained {null['share_distance.untrained']:.3f}" if subject.untrained is not None else ""
    untrained_too = ""
    if subject.untrained is not None and null["share_distance.untrained"] > 0.9 * measured["share_distance"]:
        untrained_too = " The untrained law is as near to its own vectors: this is how the law is built, not learned."
    return Finding(
        name="proximity",
        claim="C5: proximity of the context vector to the token vectors gives the conditional probability.",
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=tuple(figures),
        verdict=(
            f"Distance explains {measured['share_distance']:.3f} "
            f"[{interval['share_distance'][0]:.3f}, {interval['share_distance'][1]:.3f}] of the variance of "
            f"log-probabilities and cosine {measured['share_cosine']:.3f} (dot {measured['share_dot']:.3f}"
            f"{' by construction' * by_construction}; distance of a random vector "
            f"{null['share_distance.random_vector']:.3f}, of another path's context "
            f"{null['share_distance.other_context']:.3f}{share}); the nearest token is the most probable in "
            f"{measured[f'top{k}_distance']:.1%} of contexts "
            f"(random vector {null[f'top{k}_distance.random_vector']:.1%}, unigram "
            f"{null[f'top{k}_distance.unigram']:.1%}{beside}).{said}{untrained_too}"
        ),
    )


@jax.jit
def _contexts(model: Transformer, tokens: Int[Array, "B T"], at: Int[Array, " P"]) -> tuple[Array, Array]:
    """Context vectors [B, P, D] and log-probabilities [B, P, V] at the positions `at`."""

    def one(path: Array) -> tuple[Array, Array]:
        context = model.walk(path).context[at]
        return context, jax.nn.log_softmax(jax.vmap(model.logits)(context))

    return jax.vmap(one)(tokens)


# Nearness, and what it says.


def nearness(context: Float[np.ndarray, "... D"], U: Float[np.ndarray, "V D"]) -> dict[str, Float[np.ndarray, "... V"]]:
    """Dot product, cosine and -|c - u|^2 / 2 of contexts with every row of U: larger is nearer."""
    dot = context @ U.T
    c, u = np.linalg.norm(context, axis=-1, keepdims=True), np.linalg.norm(U, axis=-1)
    lengths = c * u
    cosine = np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0)
    return {"dot": dot, "cosine": cosine, "distance": dot - 0.5 * c**2 - 0.5 * u**2}


def identity_error(context: Float[np.ndarray, "N D"], U: Float[np.ndarray, "V D"]) -> float:
    """Largest error of c.u = |c|^2/2 + |u|^2/2 - |c-u|^2/2, relative to max(|c|^2, |u|^2)."""
    context = context[: max(1, (1 << 22) // U.size)]
    worst = 0.0
    for c in context:
        square, squares = (c**2).sum(), (U**2).sum(-1)
        error = np.abs(U @ c - 0.5 * (square + squares - ((c - U) ** 2).sum(-1)))
        worst = max(worst, float((error / np.maximum(np.maximum(square, squares), 1e-300)).max()))
    return worst


def largest(x: Float[np.ndarray, "... V"], k: int) -> Int[np.ndarray, "... k"]:
    """The indices of the k largest entries, in no order; where entries tie, always the same ones."""
    return np.argpartition(-x, k - 1, axis=-1)[..., :k]


def ranks(x: Float[np.ndarray, "... V"]) -> Float[np.ndarray, "... V"]:
    """Ranks over the last axis, from 0."""
    order = np.argsort(x, axis=-1, kind="stable")
    found = np.empty(x.shape)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(x.shape[-1], dtype=float), x.shape), axis=-1)
    return found


class Law(NamedTuple):
    """Log-probabilities [B, P, V], centred over v, their centred ranks, and for each k the k most probable tokens."""

    log_p: np.ndarray
    ranks: np.ndarray
    top: list[np.ndarray]

    @classmethod
    def of(cls, log_p: Float[np.ndarray, "B P V"], ks: Sequence[int]) -> "Law":
        """The law with these log-probabilities."""
        return cls(centred(log_p), centred(ranks(log_p)), [largest(log_p, k) for k in ks])


def centred(x: Float[np.ndarray, "... V"]) -> Float[np.ndarray, "... V"]:
    """x without its mean over the last axis."""
    return x - x.mean(-1, keepdims=True)


def score(x: Float[np.ndarray, "B P V"], law: Law) -> Float[np.ndarray, "B columns"]:
    """Per path, means over positions: x log_p, x^2, log_p^2 (centred, summed over v), Spearman, agreement with top."""
    around, r = centred(x), centred(ranks(x))
    columns = [
        (around * law.log_p).sum(-1),
        (around**2).sum(-1),
        (law.log_p**2).sum(-1),
        (r * law.ranks).sum(-1) / (law.ranks**2).sum(-1),
    ]
    for likely in law.top:
        near = largest(x, likely.shape[-1])
        columns.append((near[..., :, None] == likely[..., None, :]).any(-1).mean(-1))
    return np.stack([c.mean(1) for c in columns], axis=-1)


def summarise(sums: Float[np.ndarray, "... columns"]) -> Float[np.ndarray, "... numbers"]:
    """From means of `score`: the share explained with one slope, negative where the slope is; the rest as it is."""
    xy, xx, yy = sums[..., 0], sums[..., 1], sums[..., 2]
    scale = xx * yy
    share = np.divide(xy * np.abs(xy), scale, out=np.zeros_like(xy), where=scale > 0)
    return np.concatenate([np.expand_dims(share, -1), sums[..., 3:]], axis=-1)


# Rotation.


def rotate(model: Transformer, key: Array) -> Transformer:
    """A model with the same law whose stream lives in a randomly rotated space.

    Everything that touches the stream turns with it: token and position vectors, the maps that read it (behind a
    norm: with the norm's scale and bias folded into them), those that write to it, and the output vectors (tied ones
    become their own). RMSNorm commutes with every rotation, LayerNorm with those that fix the all-ones vector.
    Raises NotApplicable, with the reason, where no exact rotation is known.
    """
    D = model.width
    R = _rotation(D, key, fix_ones=_layer_norm(model))
    layers = Layers.of([_rotate_layer(layer, R) for layer in model.layers])

    positions = model.positions
    if isinstance(positions, SinusoidalPositions):
        positions = LearnedPositions(jax.vmap(positions)(jnp.arange(model.max_length)).astype(model.embed.table.dtype))
    if positions is not None:
        positions = dataclasses.replace(positions, table=_times(positions.table, R))

    scale, bias = (np.ones(D), None) if model.norm is None else _scale_and_bias(model.norm)
    U, b = model.output_vectors, model.unembed.bias
    if bias is not None:
        shift = np.asarray(U, float) @ bias
        if b is not None or np.any(shift):
            b = jnp.asarray(shift if b is None else shift + np.asarray(b, float), U.dtype)
    unembed = Unembed(_times(np.asarray(U, float) * scale, R, U.dtype), b, model.unembed.softcap)
    return dataclasses.replace(
        model,
        embed=Embed(_times(model.token_vectors, R)),
        positions=positions,
        layers=layers,
        norm=None if model.norm is None else _unit(model.norm),
        unembed=unembed,
    )


def _rotation(D: int, key: Array, *, fix_ones: bool) -> Float[np.ndarray, "D D"]:
    """A random rotation; with `fix_ones`, one of those that fix the all-ones vector."""
    free = D - 1 if fix_ones else D
    Q, r = np.linalg.qr(np.asarray(jax.random.normal(key, (free, free)), float))
    Q = Q * np.sign(np.diag(r))
    if free and np.linalg.det(Q) < 0:
        Q[:, 0] *= -1
    if not fix_ones:
        return Q
    basis = np.linalg.qr(np.column_stack([np.ones(D), np.eye(D)[:, 1:]]))[0]  # the first of it is the ones
    turned = np.eye(D)
    turned[1:, 1:] = Q
    return basis @ turned @ basis.T


def _rotate_layer(layer: Layer, R: np.ndarray) -> Layer:
    after = layer.placement in ("post", "res_post")

    def writes(norm: Norm | None) -> Norm | None:
        """A norm of what is written to the stream."""
        if norm is not None and np.ptp(_scale_and_bias(norm)[0]) > 0:
            raise NotApplicable(
                f"{layer.placement}-norm writes scaled vectors to the stream itself, and a scale that differs from "
                "coordinate to coordinate does not commute with rotations"
            )
        if isinstance(norm, LayerNorm) and norm.bias is not None:
            return dataclasses.replace(norm, bias=_times(norm.bias, R))
        return norm

    def part(what: str, norm: Norm, out_norm: Norm | None, module: Any) -> dict[str, Any]:
        scale, bias = (np.ones(len(R)), None) if after else _scale_and_bias(norm)
        return {
            f"{what}_norm": writes(norm) if after else _unit(norm),
            f"{what}_out_norm": writes(out_norm),
            what: _rotate_maps(module, R, scale, bias),
        }

    changes = part("aggregate", layer.aggregate_norm, layer.aggregate_out_norm, layer.aggregate)
    if layer.filter is not None and layer.filter_norm is not None:
        changes |= part("filter", layer.filter_norm, layer.filter_out_norm, layer.filter)
    return dataclasses.replace(layer, **changes)


def _rotate_maps(module: Any, R: np.ndarray, scale: np.ndarray, bias: np.ndarray | None) -> Any:
    """`module` with its maps turned: it reads (n scale + bias) through them, where n comes rotated."""
    kind = type(module)
    reads: frozenset[str] = getattr(kind, "reads", frozenset())
    writes: frozenset[str] = getattr(kind, "writes", frozenset())
    if not reads or not writes:
        raise NotApplicable(
            f"{kind.__name__} reads the stream coordinate by coordinate, not through maps that could turn"
        )
    turned = {}
    for name in sorted(reads | writes):
        m = getattr(module, name)
        weight = np.asarray(m.weight, float)
        dtype = m.weight.dtype
        if name in writes:
            turned[name] = Linear(_times(weight, R, dtype), None if m.bias is None else _times(m.bias, R))
            continue
        b = m.bias
        if bias is not None and (b is not None or np.any(bias)):
            b = jnp.asarray(bias @ weight + (0 if b is None else np.asarray(b, float)), dtype)
        turned[name] = Linear(jnp.asarray(R.T @ (scale[:, None] * weight), dtype), b)
    return dataclasses.replace(module, **turned)


def _times(rows: Any, R: np.ndarray, dtype: Any = None) -> Array:
    """Row vectors, rotated, in their own dtype or `dtype`."""
    return jnp.asarray(np.asarray(rows, float) @ R, rows.dtype if dtype is None else dtype)


def _scale_and_bias(norm: Norm) -> tuple[np.ndarray, np.ndarray | None]:
    """What a norm multiplies by and adds."""
    bias = getattr(norm, "bias", None)
    scale = np.ones(1) if norm.scale is None else np.asarray(norm.scale, float) + getattr(norm, "unit_offset", False)
    return scale, None if bias is None else np.asarray(bias, float)


def _unit(norm: Norm) -> Norm:
    """The norm without scale and bias, of the same structure."""
    if isinstance(norm, LayerNorm):
        scale, bias = jax.tree.map(jnp.ones_like, norm.scale), jax.tree.map(jnp.zeros_like, norm.bias)
        return dataclasses.replace(norm, scale=scale, bias=bias)
    return dataclasses.replace(norm, scale=jnp.full_like(norm.scale, 1 - norm.unit_offset))


def _layer_norm(model: Transformer) -> bool:
    """Whether any norm of the stream is a LayerNorm."""
    norms = [
        norm
        for block in model.layers.blocks
        for layer in block.period
        for norm in (layer.aggregate_norm, layer.aggregate_out_norm, layer.filter_norm, layer.filter_out_norm)
    ]
    return any(isinstance(norm, LayerNorm) for norm in (model.norm, *norms))
