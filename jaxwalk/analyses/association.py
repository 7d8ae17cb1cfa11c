"""C6: attention adds an association bias, and it may be redundant: what a model loses without its own patterns.

Claim: Singh, arXiv 2308.10874. Measure: a ladder of mixing matrices A put in the place of the model's own, and the loss
on held-out paths at each rung: none (A = I, which still sees the current token), a uniform causal mean, the mean
pattern of other paths by head and position, each row's own weights over shuffled keys, the whole pattern of another
path; then the model's own. In one layer at a time, and in all of them together: single layers may cost little
each where all together cost more than the model ever learned.

    association bias = (loss of the best fixed A - loss of the model) / (loss of A = I - loss of the model)

and the share that a fixed A wins is 1 minus it. It is a ratio of differences of means, bootstrapped as a whole over
paths, never clipped, and undefined where its denominator's interval reaches 0. It is about *this* model, which was
trained with its own patterns: whether they are needed at all, only training with a fixed A from scratch can say.

Nulls: the same ladder of the untrained model; the law of token frequencies, which no pattern is needed for.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import check_data, held_out_paths
from jaxwalk.evidence.statistics import batches, bootstrap, mean_interval, resampled_means
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.paths import step_log_probs

CLAIM = "C6: attention adds an association bias to the composition of context vectors, which may be redundant."
RUNGS = {
    "identity": "none (A = I)",
    "causal_mean": "causal mean",
    "corpus_mean": "corpus mean",
    "shuffled_keys": "shuffled keys",
    "other_path": "another path's",
}
FIXED = ("causal_mean", "corpus_mean")
"""The rungs whose A is the same for every path, beside A = I: the best of them is what the bias is measured from."""
FLOATS = 1 << 24
"""How many numbers of mixing matrices and of laws a batch may hold."""

WORK = 1e13
"""Floating-point operations that replacing single layers may take, roughly, as long as there are eight paths."""


def analyse(subject: Subject, *, paths: int = 256, per_layer: int = 64, length: int = 256) -> Finding:
    """What the loss becomes when the mixing matrices of the model are replaced, in each layer and in all.

    paths: held-out paths that are walked with all layers replaced; as many others give the mean pattern, and choose the
    fixed A. per_layer: on how many of them single layers are replaced; where a model is large fewer, and by A = I and
    the best fixed A only. length: the most tokens of a path.
    """
    check_data(subject)
    model, L = subject.model, subject.model.depth
    if not L:
        raise NotApplicable("the model has no layers, and so no mixing matrices")
    rows = held_out_paths(subject, 2 * paths)[:, : length + 1]
    if rows.shape[1] < 3:
        raise NotApplicable("paths have two tokens, over which nothing can be mixed")
    paths = min(paths, len(rows) // 2)
    others, own = rows[:paths], rows[paths:]
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    each = 2.0 * weights * (rows.shape[1] - 1) * L * len(RUNGS)
    sample = min(per_layer, paths, max(8, int(WORK / each)))

    ladders = {"": _ladder(model, others, own, sample, subject.seed, every_rung=8 * each <= WORK)}
    if not np.isfinite(ladders[""].losses["own"]).all():
        raise NotApplicable("losses: expected finite numbers, got NaN. Analyse an earlier step.")
    if subject.untrained is not None:
        ladders["untrained"] = _ladder(subject.untrained, others, own, 0, subject.seed)
    counts = np.bincount(others.ravel(), minlength=model.vocab_size) + 1.0
    losses = ladders[""].losses | {"unigram": -np.log(counts / counts.sum())[own[:, 1:]].mean(1)}
    costs = {name: losses[name] - losses["own"] for name in (*RUNGS, "unigram")}
    best = ladders[""].best

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}

    draws = resampled_means(np.stack([costs[best], costs["identity"]], axis=1), subject.seed)
    low, high = np.quantile(draws[:, 1], [0.025, 0.975])
    defined = bool(low > 0 or high < 0)
    if defined:
        measured["association_bias"] = float(costs[best].mean() / costs["identity"].mean())
        ends = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
        interval["association_bias"] = (float(ends[0]), float(ends[1]))
        measured["fixed_share"] = 1 - measured["association_bias"]
        interval["fixed_share"] = (1 - float(ends[1]), 1 - float(ends[0]))
        null |= {"association_bias.fixed_patterns": 0.0, "association_bias.as_bad_as_none": 1.0}
    for name in RUNGS:
        measured[f"cost_{name}"] = float(costs[name].mean())
        interval[f"cost_{name}"] = _ends(mean_interval(costs[name], subject.seed))
        null[f"cost_{name}.unigram"] = float(costs["unigram"].mean())
        if "untrained" in ladders:
            at_start = ladders["untrained"].losses
            null[f"cost_{name}.untrained"] = float((at_start[name] - at_start["own"]).mean())
    measured["loss"] = float(losses["own"].mean())
    interval["loss"] = _ends(mean_interval(losses["own"], subject.seed))
    null |= {"loss.unigram": float(losses["unigram"].mean()), "loss.uniform": float(np.log(model.vocab_size))}

    # One layer at a time, on the sample.
    single = ladders[""].single  # rung -> [sample, L], the cost of each layer alone
    for name in ("identity", best):
        measured[f"layers_alone_{name}"] = float(single[name].sum(1).mean())
        interval[f"layers_alone_{name}"] = _ends(mean_interval(single[name].sum(1), subject.seed))
        null[f"layers_alone_{name}.all_together"] = float(costs[name][:sample].mean())
    means = {name: values.mean(0) for name, values in single.items()}
    worst = int(np.argmax(means[best]))
    measured["largest_layer_cost"] = float(means[best][worst])
    interval["largest_layer_cost"] = _ends(
        bootstrap(lambda values: values.mean(0).max(), single[best], seed=subject.seed)
    )
    null["largest_layer_cost.all_together"] = float(costs[best][:sample].mean())

    arrays: dict[str, np.ndarray] = {
        "rung": np.array([*RUNGS.values(), "its own"]),
        "layer": np.array([f"layer {number}" for number in range(L)]),
        "layer_rung": np.array([RUNGS[name] for name in means]),
        "layer_cost": np.stack(list(means.values())),
    }
    series = []
    for which, ladder in ladders.items():
        per_path = np.stack([ladder.losses[name] for name in (*RUNGS, "own")], axis=1)
        key = "ladder" + (which and f"_{which}")
        arrays[key] = per_path.mean(0)
        arrays[f"{key}_low"], arrays[f"{key}_high"] = mean_interval(per_path, subject.seed)
        drawn = Series(which or "this model", key, "rung", style="bars", low=f"{key}_low", high=f"{key}_high")
        series.append(drawn if not which else Series("untrained", key, "rung", style="bars", dashed=True))
    arrays["layer_text"] = np.array([[f"{x:.3f}" for x in row] for row in arrays["layer_cost"]])
    figures = (
        Figure(
            "ladder",
            "Loss when the mixing matrices of all layers are replaced",
            "what the model's own patterns are replaced by",
            "nats per token",
            tuple(series),
            references={"unigram": null["loss.unigram"]},
        ),
        Figure(
            "layers",
            "What it costs to replace the patterns of one layer alone, nats per token",
            "layer",
            "",
            (Series("cost", "layer_cost", "layer", style="heatmap", rows="layer_rung", text="layer_text"),),
        ),
    )
    conventions: dict[str, Any] = {
        "cost": "loss with the replacement minus the loss of the model, on the same paths",
        "loss": "-log p of each token after the first, mean over tokens, then paths",
        "units": "nats per token; the bias and the share are ratios, never clipped",
        "association_bias": f"cost_{best} / cost_identity, all layers together"
        if defined
        else f"undefined: the interval of cost_identity, [{low:.3g}, {high:.3g}], reaches 0",
        "fixed_A": f"{best}, which has the lower loss of {', '.join(FIXED)} on the {paths} other paths",
        "corpus_mean": f"mean over the {paths} other paths of the model's own A, by layer, head and position",
        "shuffled_keys": "each row's weights on the keys up to it in random order, the same for all heads of a layer",
        "other_path": "the pattern that each layer has on the path before, walked undisturbed",
        "identity": "A = I, which still sees the current token",
        "layers": "upstream layers are replaced first, so that layers after them associate what they are given",
        "layers_alone": f"summed costs of single layers, on {sample} paths, against all layers together there",
        "unigram": f"law of the tokens of the other paths, with 1 added to each count; {others.size} tokens",
        "paths": f"{len(own)} of {own.shape[1]} tokens",
        "untrained": "the same ladder" if subject.untrained is not None else "not available: this model has no step 0",
        "scope": "a trained model, its patterns taken away; training with a fixed A from scratch is another question",
        "intervals": "95%, bootstrap over paths, all rungs on the same resamples",
    }  # fmt: skip
    if defined:
        said = (
            f"The association bias is {measured['association_bias']:.3f} "
            f"[{interval['association_bias'][0]:.3f}, {interval['association_bias'][1]:.3f}]: of the "
            f"{measured['cost_identity']:.3f} nat per token that mixing is worth to this model, the best fixed "
            f"patterns ({RUNGS[best]}) keep {measured['fixed_share']:.1%}"
        )
    else:
        said = (
            f"The association bias is undefined, as taking all mixing away costs {measured['cost_identity']:.3f} "
            f"[{interval['cost_identity'][0]:.3f}, {interval['cost_identity'][1]:.3f}] nat per token, perhaps nothing"
        )
    beside = f", untrained {null['cost_identity.untrained']:.3f}" if "untrained" in ladders else ""
    return Finding(
        name="association",
        claim=CLAIM,
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=figures,
        verdict=(
            f"{said}. Replacing the patterns of one layer alone by these costs at most "
            f"{measured['largest_layer_cost']:.3f} nat, of all together {measured[f'cost_{best}']:.3f} (by those of "
            f"another path {measured['cost_other_path']:.3f}, by none {measured['cost_identity']:.3f}{beside}; token "
            f"frequencies alone cost {null['cost_identity.unigram']:.3f})."
        ),
    )


class _Ladder(NamedTuple):
    """The losses of one model at every rung.

    losses: of each rung in all layers, and of "own", the mean loss of each path, [n]. single: of each rung, what each
    layer alone costs the paths of the sample, [m, L]. best: the rung of FIXED that predicts best on the other paths.
    """

    losses: dict[str, np.ndarray]
    single: dict[str, np.ndarray]
    best: str


def _ladder(
    model: Transformer,
    others: Int[np.ndarray, "n N"],
    own: Int[np.ndarray, "n N"],
    sample: int,
    seed: int,
    every_rung: bool = True,
) -> _Ladder:
    """The ladder on `own` paths, and of single layers on a sample; there of A = I and the best fixed A at least."""
    L, T = model.depth, own.shape[1] - 1
    shapes = jax.eval_shape(_patterns, model, jax.ShapeDtypeStruct((1, T), others.dtype))
    size = sum(a.size for a in shapes) + T * max(model.vocab_size, 8 * model.width)
    size = max(1, min(64, len(own), FLOATS // size))

    # The mean pattern of the others, summed over their batches.
    sums: list[Any] = [0.0] * L
    for batch, count in batches(others[:, :-1], size):
        patterns = _patterns(model, batch)
        sums = [total + A[:count].sum(0) for total, A in zip(sums, patterns, strict=True)]
    before = [A[count - 1] for A in patterns]  # what is lent to the first path
    mean = [total / len(others) for total in sums]
    uniform = jnp.tril(jnp.ones((T, T))) / jnp.arange(1, T + 1)[:, None]
    shared = {
        "identity": [jnp.broadcast_to(jnp.eye(T), A.shape) for A in mean],
        "causal_mean": [jnp.broadcast_to(uniform, A.shape) for A in mean],
        "corpus_mean": mean,
    }
    to_each = {name: [jnp.broadcast_to(A, (size, *A.shape)) for A in layers] for name, layers in shared.items()}
    none, every = np.zeros(L, bool), np.ones(L, bool)

    def score(name: str, batch: np.ndarray, layers: np.ndarray, lent: list[Array], number: int = 0) -> np.ndarray:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return np.asarray(_losses(model, batch, layers, lent, key, name == "shuffled_keys"), np.float64)

    def chosen_by(name: str) -> float:
        parts = [score(name, batch, every, to_each[name])[:count] for batch, count in batches(others, size)]
        return float(np.concatenate(parts).mean())

    best = min(FIXED, key=chosen_by)
    losses: dict[str, list[np.ndarray]] = {name: [] for name in (*RUNGS, "own")}
    single: dict[str, list[np.ndarray]] = {name: [] for name in RUNGS}
    for number, (batch, count) in enumerate(batches(own, size)):
        patterns = _patterns(model, batch[:, :-1])
        previous = [jnp.concatenate([b[None], A[:-1]]) for b, A in zip(before, patterns, strict=True)]
        before = [A[count - 1] for A in patterns]
        lent = {**to_each, "other_path": previous, "shuffled_keys": previous}  # of the last, only the shape is used
        as_is = score("own", batch, none, previous)
        losses["own"].append(as_is[:count])
        inside = min(count, sample - number * size)  # of the sample
        for name in RUNGS:
            losses[name].append(score(name, batch, every, lent[name], number)[:count])
            if inside > 0 and (every_rung or name in ("identity", best)):
                alone = [score(name, batch, np.arange(L) == layer, lent[name], number) - as_is for layer in range(L)]
                single[name].append(np.stack(alone, axis=1)[:inside])
    return _Ladder(
        {name: np.concatenate(parts) for name, parts in losses.items()},
        {name: np.concatenate(parts) for name, parts in single.items() if parts},
        best,
    )


@jax.jit
def _patterns(model: Transformer, tokens: Int[Array, "B T"]) -> list[Array]:
    """The mixing matrices of every layer, [B, G, T, T] each; layers may have different G."""
    layers = range(model.depth)
    mixing = jax.vmap(lambda path: model.walk(path, record_mixing=layers).mixing)(tokens)
    return [mixing[layer] for layer in layers]


@jax.jit
def _losses(
    model: Transformer,
    rows: Int[Array, "B N"],
    layers: Bool[Array, " L"],
    lent: list[Array],
    key: Array,
    shuffled: Array | bool,
) -> Float[Array, " B"]:
    """Mean loss of each path when `layers` mix by the patterns that are `lent`, or by their own `shuffled` over keys.

    lent: [B, G, T, T] of each layer.

    All choices are traced: one program for all rungs, all sets of layers and all models of one shape.
    """

    def one(row: Array, lent: list[Array], key: Array) -> Array:
        def replaced(layer: int, A: Array) -> Array:
            by = jnp.where(shuffled, jnp.take_along_axis(A, order[layer][None], axis=-1), lent[layer].astype(A.dtype))
            return jnp.where(layers[layer], by, A)

        T = len(row) - 1
        # Each row's keys up to its own position in random order, then the others.
        noise = jnp.where(jnp.tril(jnp.ones((T, T), bool)), jax.random.uniform(key, (model.depth, T, T)), jnp.inf)
        order = jnp.argsort(noise, axis=-1)
        mixing = {layer: functools.partial(replaced, layer) for layer in range(model.depth)}
        return -step_log_probs(model, row, mixing=mixing).mean()

    return jax.vmap(one)(rows, lent, jax.random.split(key, len(rows)))


def _ends(ends: Any) -> tuple[float, float]:
    return float(ends[0]), float(ends[1])
