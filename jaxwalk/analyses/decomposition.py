"""C6: a context vector is made of its tokens, step by step; the parts add up to it exactly.

Claim: Singh, arXiv 2308.10874. Measure: the decomposition with held coefficients (`jaxwalk.decomposition`), of the
context vectors at the ends of paths. Parts are measured along the context vector itself, so that their shares sum to
one; a share may be negative. Two cuts: by source token, through everything between; and by the step that added to the
residual stream. That the parts add up is arithmetic, and holds for the untrained model too, which is the null of the
shares. Whether a token's part of log p(next token) says what the token did is another question: parts are held
against exact occlusion (the token's vector replaced by the mean token vector), beside other ways of guessing it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from scipy import stats

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import check_data, held_out_paths
from jaxwalk.evidence.statistics import mean_interval
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.probes.attribution import gradient_attribution, occlusion
from jaxwalk.probes.decomposition import TOLERANCE, DecompositionError, decompose, decompose_steps, log_prob_readout

WORK = 2.5e12
"""Floating-point operations that all paths together may take, roughly, as long as there are eight of them."""

SHARES = {
    "own_token": "the position's own token",
    "earlier_tokens": "earlier tokens",
    "positions": "position vectors",
    "biases": "biases",
}
STEPS = {"embedding": "embedding", "aggregates": "aggregate steps", "filters": "filter steps", "norms": "norms' biases"}


def analyse(subject: Subject, *, paths: int = 32, length: int = 24) -> Finding:
    """What the context vectors at the ends of paths are made of.

    paths: how many, fewer where a model is large. length: the most tokens of a path. Raises NotApplicable for a model
    without layers or without data, and where the parts do not sum to the whole.
    """
    check_data(subject)
    model = subject.model
    if not model.depth:
        raise NotApplicable("the model has no layers: every context vector is its own token's")
    if jnp.dtype(model.embed.table.dtype) not in TOLERANCE:
        raise NotApplicable(f"expected a model in float32 or float64, got {model.embed.table.dtype}")
    if whole := sorted({type(a).__name__ for layer in model.layers if (a := layer.aggregate).kind == "none"}):
        raise NotApplicable(f"{', '.join(whole)}: no sum of weighted values, and so in no parts")
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    rows = held_out_paths(subject, paths)[:, : length + 1]
    T = rows.shape[1] - 1
    if T < 2:
        raise NotApplicable("paths have two tokens, and so contexts of one")
    # Occlusion walks every path once for each of its tokens; the rest takes about as much as ten walks.
    rows = rows[: max(8, int(WORK / (2.0 * weights * T * (T + 10))))]
    seen = {"": _see(model, rows)}
    if subject.untrained is not None:
        seen["untrained"] = _see(subject.untrained, rows)
    main = seen[""]

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}

    def add(name: str, per_path: np.ndarray, **against: float | np.ndarray) -> None:
        measured[name] = float(per_path.mean())
        low, high = mean_interval(per_path, subject.seed)
        interval[name] = float(low), float(high)
        null.update({f"{name}.{other}": float(np.mean(value)) for other, value in against.items()})

    for what, values in (("by_source", SHARES), ("by_kind", STEPS)):
        for i, name in enumerate(values):
            against = {which: getattr(one, what)[:, i] for which, one in seen.items() if which}
            if what == "by_source" and i < 2:
                against["tokens_alike"] = np.array([1 / T, 1 - 1 / T][i])
            add(f"share_{name}", getattr(main, what)[:, i], **against)
    add("cancellation", main.cancellation, none=1.0, **{w: one.cancellation for w, one in seen.items() if w})
    measured["largest_error"] = float(main.error.max())
    null["largest_error.exact"] = 0.0

    occluded, gradient = (
        np.stack([np.asarray(method(model, row[:-1], int(row[-1])).by_token, np.float64) for row in rows])
        for method in (occlusion, gradient_attribution)
    )
    guesses = {
        "gradient_times_input": gradient,
        "recency": np.broadcast_to(np.arange(T), occluded.shape),
        "other_path": np.concatenate([main.held[-1:], main.held[:-1]]),
    }
    add(
        "occlusion_spearman",
        _rank_correlation(main.held, occluded),
        **{name: _rank_correlation(guess, occluded) for name, guess in guesses.items()},
    )

    distance = np.arange(T)
    arrays: dict[str, Any] = {
        "distance": distance,
        "step": np.array([f"{kind} {n}" for n in range(model.depth) for kind in ("aggregate", "filter")]),
        "held": main.held,
        "occluded": occluded,
        "gradient": gradient,
        "error": main.error,
        "rows": rows,
    }
    lines, bars = [], []
    for which, one in seen.items():
        suffix = which and f"_{which}"
        back, steps = one.by_token[:, ::-1], one.by_step
        arrays[f"share{suffix}"], arrays[f"by_step{suffix}"] = back.mean(0), steps.mean(0)
        arrays[f"share{suffix}_low"], arrays[f"share{suffix}_high"] = mean_interval(back, subject.seed)
        arrays[f"by_step{suffix}_low"], arrays[f"by_step{suffix}_high"] = mean_interval(steps, subject.seed)
        options: dict[str, Any] = {"low": f"share{suffix}_low", "high": f"share{suffix}_high"}
        lines.append(Series(which or "this model", f"share{suffix}", "distance", dashed=bool(which), **options))
        options = {"low": f"by_step{suffix}_low", "high": f"by_step{suffix}_high", "style": "bars"}
        bars.append(Series(which or "this model", f"by_step{suffix}", "step", dashed=bool(which), **options))
    figures = (
        Figure(
            "decomposition_by_token",
            "How much of the context vector comes from a token, through all steps, by its distance",
            "tokens back from the position",
            "share of the context vector",
            tuple(lines),
            references={"all tokens alike": 1 / T},
        ),
        Figure(
            "decomposition_by_step",
            "How much of the context vector each step adds",
            "step",
            "share of the context vector",
            tuple(bars),
            references={"nothing": 0.0},
        ),
    )
    conventions = {
        "paths": len(rows),
        "position": f"the last of {T}",
        "share": "part . c / |c|^2 of the context vector c: shares of a cut sum to 1, and may be negative",
        "cuts": "own_token, earlier_tokens, positions and biases are one cut, by source, through all steps (total); "
        "embedding, aggregates, filters and norms another, by the step that adds to the stream, its biases with it "
        "(direct)",
        "cancellation": "sum of the sizes of the parts of tokens, positions and biases along c, over their sum",
        "largest_error": "of any sum of parts, relative to the context vector",
        "occlusion_spearman": "rank correlation over a path's tokens of their parts of log p(next token) with how far "
        "it falls when the token's vector is replaced by the mean token vector; mean over paths; recency: later tokens "
        "are taken to do more; other_path: the parts of another path",
        "intervals": "95%, bootstrap over paths",
        "untrained": "the same of the untrained model" if "untrained" in seen else "not available",
    }
    verdict = (
        f"Of the context vector {measured['share_own_token']:.1%} comes from the position's own token and "
        f"{measured['share_earlier_tokens']:.1%} from earlier ones; aggregate steps add "
        f"{measured['share_aggregates']:.1%} of it, filter steps {measured['share_filters']:.1%}"
        + (
            f" (untrained: {null['share_own_token.untrained']:.1%}, {null['share_earlier_tokens.untrained']:.1%}; "
            f"{null['share_aggregates.untrained']:.1%}, {null['share_filters.untrained']:.1%})"
            if "untrained" in seen
            else ""
        )
        + f"; the parts add up to {measured['largest_error']:.1g}. Parts of log p order tokens as occlusion does with "
        f"rank correlation {measured['occlusion_spearman']:.2f} (gradient times input "
        f"{null['occlusion_spearman.gradient_times_input']:.2f}, recency {null['occlusion_spearman.recency']:.2f})."
    )
    return Finding(
        "decomposition",
        "C6: context vectors are composed by an encoding walk that aggregates features of the tokens.",
        measured,
        interval,
        null,
        conventions,
        arrays,
        figures,
        verdict,
    )


class _Seen(NamedTuple):
    """Of each of n paths of T + 1 tokens, at position T. Shares are of the context vector.

    by_token: [n, T]. by_source: [n, 4], as in SHARES. by_step: [n, 2L], with the step's biases. by_kind: [n, 4], as in
    STEPS. cancellation, error: [n]. held: [n, T], each token's part of log p(the last token), in nats.
    """

    by_token: np.ndarray
    by_source: np.ndarray
    by_step: np.ndarray
    by_kind: np.ndarray
    cancellation: np.ndarray
    error: np.ndarray
    held: np.ndarray


def _see(model: Transformer, rows: Int[np.ndarray, "n N"]) -> _Seen:
    seen = []
    for row in rows:
        path = row[:-1]
        try:
            steps = decompose_steps(model, path)
            c = np.asarray(steps.whole, np.float64)
            if not np.isfinite(c).all() or not c.any():
                raise NotApplicable("context vectors: expected finite numbers, not all 0. Analyse an earlier step.")
            along = (c / (c @ c)).astype(steps.whole.dtype)
            directions = jnp.stack([along, log_prob_readout(model, steps.whole, int(row[-1])).direction])
            tokens = decompose(model, path, along=directions)
        except DecompositionError as error:
            raise NotApplicable(f"it is exact or it is nothing: {error}") from error
        (by_token, held), (by_position, _) = (
            np.asarray(a.T, np.float64) for a in (tokens.by_token, tokens.by_position)
        )
        bias = float(tokens.bias[0])
        by_step = np.asarray(steps.by_step + steps.by_step_bias, np.float64) @ along
        embedding = float(np.asarray(steps.token + steps.position, np.float64) @ along)
        norms = float(np.asarray(steps.bias, np.float64) @ along)
        seen.append(
            _Seen(
                by_token,
                np.array([by_token[-1], by_token[:-1].sum(), by_position.sum(), bias]),
                by_step,
                np.array([embedding, by_step[0::2].sum(), by_step[1::2].sum(), norms]),
                np.array(np.abs(by_token).sum() + np.abs(by_position).sum() + abs(bias)),
                np.array(max(float(steps.error), float(tokens.error))),
                held,
            )
        )
    return _Seen(*(np.stack(parts) for parts in zip(*seen, strict=True)))


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho of each row of [n, T]; 0 where a row has no order."""
    ranks = [stats.rankdata(x, axis=1) for x in (a, b)]
    ranks = [x - x.mean(1, keepdims=True) for x in ranks]
    size = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    return (ranks[0] * ranks[1]).sum(1) / np.where(size > 0, size, 1)
