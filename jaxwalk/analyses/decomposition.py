"""C6: a context vector is made of its tokens, step by step; the parts add up to it exactly.

The decomposition with held coefficients (`jaxwalk.decompose`) of the context vectors at the ends of paths. Parts are
measured along the context vector itself, so that their shares sum to one; a share may be negative. Two cuts: by source
token, through everything between; and by the step that added to the residual stream.

That the parts add up is arithmetic, of the untrained model too: a self-check. It cannot see a coefficient that is not
held in a map that is homogeneous of degree one, as the derivative of such a map along its argument is the map itself.
Whether a token's part of log p(next token) says what the token did is another question, which is decided here: parts
are compared with exact occlusion (the token's vector replaced by the mean token vector), beside cheaper guesses of it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import stats

from jaxwalk.evidence import engine
from jaxwalk.evidence.decision import Check, Quantity, numbers
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import check_data
from jaxwalk.evidence.statistics import mean_interval
from jaxwalk.evidence.subject import Draw, Subject
from jaxwalk.model import Transformer
from jaxwalk.probes.attribution import gradient_attribution, occlusion
from jaxwalk.probes.decomposition import TOLERANCE, decompose, decompose_steps, log_prob_readout

WORK = 2.5e12
"""About the most floating-point operations that all paths together take, as long as there are eight of them."""
SMALLEST_CORRELATION = 0.05
"""The smallest difference of rank correlations that matters: an order of tokens that is visibly better."""
SHARES = {
    "own_token": "the position's own token",
    "earlier_tokens": "earlier tokens",
    "positions": "position vectors",
    "biases": "biases",
}
STEPS = {"embedding": "embedding", "aggregates": "aggregate steps", "filters": "filter steps", "norms": "norms' biases"}


class Parts(NamedTuple):
    """The parts of the context vector at position T of a path of T + 1 tokens. Shares are of the context vector.

    Attributes:
        by_token: [T], the share of each token.
        by_source: [4], as in SHARES.
        by_step: [2L], the share of each step, with its biases.
        by_kind: [4], as in STEPS.
        cancellation: [], sum of the sizes of the shares of tokens, positions and biases.
        error: [], the largest of any sum of parts, relative.
        held: [T], each token's part of log p(the last token), in nats.
    """

    by_token: Any
    by_source: Any
    by_step: Any
    by_kind: Any
    cancellation: Any
    error: Any
    held: Any


def analyse(subject: Subject, *, paths: int = 32, length: int = 24) -> Finding:
    """What the context vectors at the ends of paths are made of.

    Args:
        subject: the model and its data.
        paths: the number of paths; there are fewer if the model is large.
        length: the most tokens of a path.

    Raises:
        NotApplicable: if the model has no layers, no sums of weighted values or no data, or is narrower than float32.
    """
    check_data(subject)
    model = subject.model
    if not model.depth:
        raise NotApplicable("the model has no layers: every context vector is its own token's")
    dtype = jnp.dtype(model.embed.table.dtype)
    if dtype not in TOLERANCE:
        raise NotApplicable(f"expected a model in float32 or float64, got {dtype}")
    if whole := sorted({type(a).__name__ for layer in model.layers if (a := layer.aggregate).kind == "none"}):
        raise NotApplicable(f"{', '.join(whole)}: no sum of weighted values, and so no parts")
    T = min(length, subject.length)
    if T < 2:
        raise NotApplicable("paths have two tokens, and so contexts of one")
    # Occlusion walks every path once for each of its tokens; the rest takes about as much as ten walks.
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    draw = subject.draw(min(paths, max(8, int(WORK / (2.0 * weights * T * (T + 10))))), T + 1)

    models = {"": model} | ({} if subject.untrained is None else {"untrained": subject.untrained})
    few = engine.ELEMENTS // T  # each path is walked T times at once
    parts = {who: engine.measure(parts_of_path, m, draw.tokens, elements=few) for who, m in models.items()}
    occluded, gradient = engine.measure(effects_of_tokens, model, draw.tokens, elements=few)
    orders = _orders(parts, occluded, gradient, draw)
    arrays, figures = _pictures(parts, model.depth)
    error = max(float(p.error.max()) for p in parts.values())
    guess = max(("gradient_times_input", "recency"), key=lambda name: orders.references[name])
    return Finding(
        name="decomposition",
        claim="C6: context vectors are composed by an encoding walk that aggregates features of the tokens.",
        **numbers([orders, *_shares(parts, draw)]),
        conventions=_conventions(draw),
        arrays=arrays | {"occluded": occluded, "gradient": gradient, "rows": draw.tokens},
        figures=figures,
        primary=(
            orders.contrast(
                guess,
                "C6",
                "a token's part of the log-probability says how much it falls without the token, better than guesses",
                at_least=SMALLEST_CORRELATION,
            ),
        ),
        checks=(
            Check(
                "largest_error",
                error,
                TOLERANCE[dtype],
                "the parts sum to the context vector; blind to an unheld map that is homogeneous of degree one",
            ),
        ),
    )


def parts_of_path(model: Transformer, row: Int[Array, " N"]) -> Parts:
    """The parts of the context vector of the last token but one."""
    path = row[:-1]
    steps = decompose_steps(model, path)
    c = steps.whole
    along = c / (c @ c)  # NaN for a context vector of zeros, which the engine refuses
    directions = jnp.stack([along, log_prob_readout(model, c, row[-1]).direction])
    tokens = decompose(model, path, along=directions)
    by_token, by_position, bias = tokens.by_token[:, 0], tokens.by_position[:, 0], tokens.bias[0]
    by_step = (steps.by_step + steps.by_step_bias) @ along
    return Parts(
        by_token=by_token,
        by_source=jnp.stack([by_token[-1], by_token[:-1].sum(), by_position.sum(), bias]),
        by_step=by_step,
        by_kind=jnp.stack(
            [(steps.token + steps.position) @ along, by_step[0::2].sum(), by_step[1::2].sum(), steps.bias @ along]
        ),
        cancellation=jnp.abs(by_token).sum() + jnp.abs(by_position).sum() + jnp.abs(bias),
        error=jnp.maximum(steps.error, tokens.error),
        held=tokens.by_token[:, 1],
    )


def effects_of_tokens(model: Transformer, row: Int[Array, " N"]) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """How far log p(the last token) falls without each token, by occlusion, and by gradient times input; in nats."""
    return occlusion(model, row[:-1], row[-1]).by_token, gradient_attribution(model, row[:-1], row[-1]).by_token


def rank_correlation(a: Float[np.ndarray, "n T"], b: Float[np.ndarray, "n T"]) -> Float[np.ndarray, " n"]:
    """Spearman's rho of each row; 0 if a row has no order."""
    ranks = [stats.rankdata(x, axis=1) for x in (a, b)]
    ranks = [x - x.mean(1, keepdims=True) for x in ranks]
    size = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    return (ranks[0] * ranks[1]).sum(1) / np.where(size > 0, size, 1)


def _orders(parts: Mapping[str, Parts], occluded: np.ndarray, gradient: np.ndarray, draw: Draw) -> Quantity:
    """How well parts of log p order the tokens of a path as occlusion does, beside other guesses of its order."""
    held = parts[""].held
    guesses = {
        "gradient_times_input": gradient,
        "recency": np.broadcast_to(np.arange(float(held.shape[1])), held.shape),
        "other_path": np.roll(held, 1, axis=0),
    }
    return Quantity(
        "occlusion_spearman",
        rank_correlation(held, occluded),
        {name: rank_correlation(guess, occluded) for name, guess in guesses.items()},
        "rank correlation",
        documents=draw.documents,
    )


def _shares(parts: Mapping[str, Parts], draw: Draw) -> list[Quantity]:
    """The shares of both cuts, and how much the parts of one cancel."""
    T = draw.tokens.shape[1] - 1
    alike = {"own_token": 1 / T, "earlier_tokens": 1 - 1 / T}

    def quantity(name: str, per_path: Mapping[str, np.ndarray], **nulls: float) -> Quantity:
        against = nulls | {who: values for who, values in per_path.items() if who}
        return Quantity(name, per_path[""], against, "share", documents=draw.documents)

    quantities = []
    for cut, values in (("by_source", SHARES), ("by_kind", STEPS)):
        for i, name in enumerate(values):
            nulls = {"tokens_alike": alike[name]} if name in alike else {}
            per_path = {who: getattr(p, cut)[:, i] for who, p in parts.items()}
            quantities.append(quantity(f"share_{name}", per_path, **nulls))
    return [*quantities, quantity("cancellation", {who: p.cancellation for who, p in parts.items()}, none=1.0)]


def _pictures(parts: Mapping[str, Parts], depth: int) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    T = parts[""].by_token.shape[1]
    arrays: dict[str, np.ndarray] = {
        "distance": np.arange(T),
        "step": np.array([f"{kind} {n}" for n in range(depth) for kind in ("aggregate", "filter")]),
        "held": parts[""].held,
        "error": parts[""].error,
    }
    series: dict[str, list[Series]] = {"share": [], "by_step": []}
    for who, of in parts.items():
        for name, values in (("share", of.by_token[:, ::-1]), ("by_step", of.by_step)):
            key = f"{name}_{who}" if who else name
            arrays[key] = values.mean(0)
            arrays[f"{key}_low"], arrays[f"{key}_high"] = mean_interval(values)
            bands: dict[str, Any] = {"low": f"{key}_low", "high": f"{key}_high", "dashed": bool(who)}
            x, style = ("distance", "line") if name == "share" else ("step", "bars")
            series[name].append(Series(who or "this model", key, x, style=style, **bands))  # type: ignore[arg-type]
    by_token = Figure(
        "decomposition_by_token",
        "How much of the context vector comes from a token, through all steps, by its distance",
        "tokens back from the position",
        "share of the context vector",
        tuple(series["share"]),
        references={"all tokens alike": 1 / T},
    )
    by_step = Figure(
        "decomposition_by_step",
        "How much of the context vector each step adds",
        "step",
        "share of the context vector",
        tuple(series["by_step"]),
        references={"nothing": 0.0},
    )
    return arrays, (by_token, by_step)


def _conventions(draw: Draw) -> dict[str, Any]:
    return {
        "paths": len(draw.tokens),
        "position": f"the last of {draw.tokens.shape[1] - 1}",
        "share": "part . c / |c|^2 of the context vector c: shares of a cut sum to 1, and may be negative",
        "cuts": "own_token, earlier_tokens, positions and biases are one cut, by source, through all steps (total); "
        "embedding, aggregates, filters and norms another, by the step that adds to the stream, its biases with it "
        "(direct)",
        "cancellation": "sum of the sizes of the parts of tokens, positions and biases along c, over their sum",
        "occlusion_spearman": "rank correlation over a path's tokens of their parts of log p(next token) with how far "
        "it falls when the token's vector is replaced by the mean token vector; mean over paths; recency: later tokens "
        "are taken to do more; other_path: the parts of another path",
    }
