"""C6: attention adds an association bias, and it may be redundant: what a model loses without its own patterns.

A ladder of mixing matrices A put in the place of the model's own, and the loss on held-out paths at each rung: none
(A = I, which still sees the current token), a uniform causal mean, the mean pattern of other paths by head and
position, each row's own weights over shuffled keys, the whole pattern of another path; then the model's own. In one
layer at a time, and in all of them together. Rows of A = I and of the causal mean sum to what those of the mean pattern
do, which is 1 for a softmax only.

Attention adds an association bias to this model if it predicts better with its own patterns than the best law without
association does: the best fixed A, A = I, or token frequencies. The size of the bias is

    association bias = (loss of the best fixed A - loss of the model) / (loss of A = I - loss of the model)

and the share that a fixed A wins is 1 minus it: of *this* model, which was trained with its own patterns. Whether they
are redundant, only training with a fixed A from scratch can say: `examples/association_ladder.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.evidence import engine
from jaxwalk.evidence.decision import Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import check_data
from jaxwalk.evidence.statistics import mean_interval
from jaxwalk.evidence.subject import Draw, Subject
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
COST = 0.01
"""Nats per token: 1% of a token's probability, the least that patterns must be worth to matter."""
FLOATS = 1 << 24
"""About the most numbers of mixing matrices and of laws that a batch may hold."""
WORK = 1e13
"""About the most floating-point operations for replacing single layers, as long as there are eight paths."""

LENT, SHUFFLED, OTHER = range(3)


def analyse(subject: Subject, *, paths: int = 256, per_layer: int | None = None, length: int = 256) -> Finding:
    """What the loss becomes when the mixing matrices of the model are replaced, in each layer and in all.

    Args:
        subject: the model and its data.
        paths: held-out paths; as many others give the mean pattern, and choose the fixed A.
        per_layer: on how many of them single layers are replaced, by A = I and by the best fixed A; by default all, of
            a large model fewer.
        length: the most tokens of a path.
    """
    check_data(subject)
    kinds = _kinds(subject.model)
    own, fitted = _paths(subject, paths, length)
    rows, T = own.tokens, own.tokens.shape[1] - 1
    model, L = subject.model, subject.model.depth
    ladder = _Ladder(model, rows, fitted, subject.seed)
    losses, on_fitted = ladder.losses(), ladder.fixed()
    best = min(FIXED, key=on_fitted.__getitem__)
    at_start = {} if subject.untrained is None else _Ladder(subject.untrained, rows, fitted, subject.seed).losses()
    counts = np.bincount(fitted.ravel(), minlength=model.vocab_size) + 1.0
    unigram = -np.log(counts / counts.sum())

    each = 2.0 * sum(leaf.size for leaf in jax.tree.leaves(model.layers)) * T * L * 2
    sample = min(len(rows) if per_layer is None else per_layer, len(rows), max(8, int(WORK / each)))
    single = {name: ladder.alone(name, sample) - losses["own"][:sample, None] for name in ("identity", best)}

    costs = {name: losses[name] - losses["own"] for name in RUNGS}
    costs["unigram"] = unigram[rows[:, 1:]].mean(axis=1) - losses["own"]
    starts = {name: at_start[name] - at_start["own"] for name in RUNGS if at_start}
    bias = _bias(costs[best], costs["identity"], own.documents, kinds)
    loss = Quantity(
        "loss",
        losses["own"],
        {
            "best_fixed": losses[best],
            "identity": losses["identity"],
            "unigram": losses["own"] + costs["unigram"],
            "uniform": float(np.log(model.vocab_size)),
        },
        "nats per token",
        documents=own.documents,
    )
    quantities = [*bias, loss, *_costs(costs, starts, own.documents), *_layers(single, costs, best, own.documents)]
    on_fitted = {"best_fixed": on_fitted[best], "identity": on_fitted["identity"]}
    on_fitted["unigram"] = float(unigram[fitted[:, 1:]].mean())
    arrays = _arrays(losses, at_start, single)
    return Finding(
        name="association",
        claim=CLAIM,
        **numbers(quantities),
        conventions=_conventions(subject, own, fitted, best, sample, bool(bias), kinds),
        arrays=arrays,
        figures=_figures(arrays, loss.references["unigram"]),
        primary=(_decided(loss, on_fitted, best, kinds),),
    )


def _kinds(model: Transformer) -> frozenset[str]:
    """What the mixing matrices of the layers mean. Raises NotApplicable if there are none to replace."""
    if not model.depth:
        raise NotApplicable("the model has no layers, and so no mixing matrices")
    aggregates = [layer.aggregate for layer in model.layers]
    if without := sorted({type(aggregate).__name__ for aggregate in aggregates if aggregate.kind == "none"}):
        raise NotApplicable(f"{', '.join(without)} mixes positions by no matrix that could be replaced")
    return frozenset(aggregate.kind for aggregate in aggregates)


def _paths(subject: Subject, n: int, length: int) -> tuple[Draw, Int[np.ndarray, "m N"]]:
    """Held-out paths of at most length + 1 tokens, and others to fit on."""
    N = min(subject.length, length) + 1
    while True:
        try:
            own, fitted = subject.draw(n, N), subject.draw(n, N, to_fit=True)
            break
        except NotApplicable:
            if N <= 8:
                raise
            N = N // 2 + 1
    if N < 3:
        raise NotApplicable("paths have two tokens, over which nothing can be mixed")
    if len(own.tokens) < 8:
        raise NotApplicable(f"expected at least 8 paths for an interval, got {len(own.tokens)}. Analyse more paths.")
    return own, fitted.tokens


# What is measured


def mean_patterns(model: Transformer, rows: Int[Array, "n N"]) -> list[Float[Array, "_ T T"]]:
    """The mean over some paths of the mixing matrices of each layer; layers may have different G."""
    patterns = functools.partial(_patterns, model)
    total = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(patterns, rows[0]))
    total, _ = lax.scan(lambda total, row: (jax.tree.map(jnp.add, total, patterns(row)), None), total, rows)
    return jax.tree.map(lambda a: a / len(rows), total)


def _patterns(model: Transformer, row: Int[Array, " N"]) -> list[Float[Array, "_ T T"]]:
    mixing = model.walk(row[:-1], record_mixing=range(model.depth)).mixing
    return [mixing[layer] for layer in range(model.depth)]


def replaced_loss(
    model: Transformer,
    row: Int[Array, " N"],
    other: Int[Array, " N"],
    number: Int[Array, ""],
    patterns: list[Float[Array, "_ T T"]],
    layers: Bool[Array, " L"],
    by: Array,
    seed: Array,
) -> Float[Array, ""]:
    """The mean loss of a path when the mixing matrices of some layers are replaced.

    All choices are traced: one program for all rungs, all sets of layers and all models of one shape.

    Args:
        model: the model.
        row: the path.
        other: another path.
        number: of the path, for its random numbers.
        patterns: those of every layer.
        layers: which layers are replaced. Those before come first, so that later ones associate what they are given.
        by: `LENT`, the `patterns`; `SHUFFLED`, each row's own weights on the keys up to it, in random order that heads
            of a layer share; or `OTHER`, the patterns of the other path, walked undisturbed.
        seed: of the random numbers.
    """
    T = len(row) - 1
    lent = lax.cond(by == OTHER, lambda: _patterns(model, other), lambda: patterns)

    def drawn() -> Array:
        """Each row's keys up to its own position in random order, then the others."""
        key = jax.random.fold_in(jax.random.key(seed), number)
        noise = jax.random.uniform(key, (model.depth, T, T))
        return jnp.argsort(jnp.where(jnp.tril(jnp.ones((T, T), bool)), noise, jnp.inf), axis=-1)

    order = lax.cond(by == SHUFFLED, drawn, lambda: jnp.zeros((model.depth, T, T), int))

    def replaced(layer: int, A: Array) -> Array:
        by_order = jnp.take_along_axis(A, order[layer][None], axis=-1)
        return jnp.where(layers[layer], jnp.where(by == SHUFFLED, by_order, lent[layer].astype(A.dtype)), A)

    mixing = {layer: functools.partial(replaced, layer) for layer in range(model.depth)}
    return -step_log_probs(model, row, mixing=mixing).mean()


class _Ladder:
    """The losses of one model at every rung."""

    def __init__(
        self, model: Transformer, rows: Int[np.ndarray, "n N"], fitted: Int[np.ndarray, "m N"], seed: int
    ) -> None:
        self.model, self.rows, self.seed = model, rows.astype(np.int32), np.int32(seed)
        self.fitted = fitted.astype(np.int32)
        T = rows.shape[1] - 1
        mean = [A[0].astype(np.float32) for A in engine.measure(mean_patterns, model, self.fitted[None])]
        scales = [A.sum(axis=-1, keepdims=True) for A in mean]
        uniform = np.tril(np.ones((T, T), np.float32)) / np.arange(1, T + 1, dtype=np.float32)[:, None]
        self.patterns = {
            "identity": [np.eye(T, dtype=np.float32) * scale for scale in scales],
            "causal_mean": [uniform * scale for scale in scales],
            "corpus_mean": mean,
        }
        size = 3 * sum(A.size for A in mean) + T * max(model.vocab_size, 8 * model.width)
        self.elements = max(1, FLOATS // size) * (T + 1) * (4 * model.width + model.vocab_size)

    def fixed(self) -> dict[str, float]:
        """The mean loss, on the paths that the mean pattern is fitted on, of the rungs whose A is fixed."""
        every = np.ones(self.model.depth, bool)
        return {name: float(self._loss(name, self.fitted, every).mean()) for name in self.patterns}

    def losses(self) -> dict[str, Float[np.ndarray, " n"]]:
        """The loss of each path at each rung, and with the model's "own" patterns."""
        none, every = np.zeros(self.model.depth, bool), np.ones(self.model.depth, bool)
        found = {name: self._loss(name, self.rows, every) for name in RUNGS}
        return found | {"own": self._loss("identity", self.rows, none)}

    def alone(self, name: str, sample: int) -> Float[np.ndarray, "m L"]:
        """The loss of each of the first paths at one rung of a single layer."""
        layers = np.eye(self.model.depth, dtype=bool)
        return np.stack([self._loss(name, self.rows[:sample], layer) for layer in layers], axis=1)

    def _loss(self, name: str, rows: np.ndarray, layers: np.ndarray) -> np.ndarray:
        by = {"shuffled_keys": SHUFFLED, "other_path": OTHER}.get(name, LENT)
        others = np.roll(rows, 1, axis=0)
        lent = self.patterns.get(name, self.patterns["corpus_mean"])
        count = np.arange(len(rows), dtype=np.int32)
        shared = (lent, layers, np.int32(by), self.seed)
        return np.asarray(
            engine.measure(replaced_loss, self.model, rows, others, count, shared=shared, elements=self.elements)
        )


# The numbers


def _bias(fixed: np.ndarray, identity: np.ndarray, documents: np.ndarray, kinds: frozenset[str]) -> list[Quantity]:
    """The association bias, where mixing is worth enough to this model, and A is all that passes between positions."""
    denominator = Quantity("", identity, documents=documents).interval
    if kinds != {"exact"} or denominator is None or not (denominator[0] > 0 and identity.mean() >= COST):
        return []
    nulls = {"fixed_patterns": 0.0, "as_bad_as_none": 1.0}
    ratio = lambda means: means[..., 0] / means[..., 1]
    return [Quantity("association_bias", np.stack([fixed, identity], 1), nulls, "ratio", ratio, documents)]


def _costs(costs: dict[str, np.ndarray], starts: dict[str, np.ndarray], documents: np.ndarray) -> list[Quantity]:
    """What each rung costs, in all layers together."""
    found = []
    for name in RUNGS:
        nulls = {"unigram": costs["unigram"]} | ({"untrained": starts[name]} if starts else {})
        found.append(Quantity(f"cost_{name}", costs[name], nulls, "nats per token", documents=documents))
    return found


def _layers(
    single: dict[str, np.ndarray], costs: dict[str, np.ndarray], best: str, documents: np.ndarray
) -> list[Quantity]:
    """What it costs to replace each layer alone, summed and at most, beside all layers together on the same paths."""
    m = len(single[best])
    found = [
        Quantity(
            f"layers_alone_{name}",
            single[name].sum(axis=1),
            {"all_together": costs[name][:m]},
            "nats per token",
            documents=documents[:m],
        )
        for name in ("identity", best)
    ]
    largest = lambda means: means.max(axis=-1)
    together = np.repeat(costs[best][:m, None], single[best].shape[1], axis=1)
    nulls = {"all_together": together}
    return [*found, Quantity("largest_layer_cost", single[best], nulls, "nats per token", largest, documents[:m])]


def _decided(loss: Quantity, on_fitted: dict[str, float], best: str, kinds: frozenset[str]) -> Contrast:
    """The model against the best law without association, which is chosen on other paths."""
    statement = "this model predicts better with its own patterns than the best law without association does"
    if "conditional" in kinds:
        reason = "the values that A combines read the past by themselves, so that a fixed A does not take it away"
        return untestable("C6", statement, "loss", reason)
    null = min(on_fitted, key=on_fitted.__getitem__)
    label = {
        "best_fixed": f"{RUNGS[best]} in all layers",
        "identity": RUNGS["identity"],
        "unigram": "token frequencies",
    }
    return loss.contrast(null, "C6", statement, at_most=-COST, label=label[null])


def _arrays(
    losses: dict[str, np.ndarray], at_start: dict[str, np.ndarray], single: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    means = np.stack([costs.mean(axis=0) for costs in single.values()])
    arrays = {
        "rung": np.array([*RUNGS.values(), "its own"]),
        "layer": np.array([f"layer {number}" for number in range(means.shape[1])]),
        "layer_rung": np.array([RUNGS[name] for name in single]),
        "layer_cost": means,
        "layer_text": np.array([[f"{x:.3f}" for x in row] for row in means]),
    }
    for key, ladder in {"ladder": losses, "ladder_untrained": at_start}.items():
        if ladder:
            per_path = np.stack([ladder[name] for name in (*RUNGS, "own")], axis=1)
            arrays[key] = per_path.mean(axis=0)
            arrays[f"{key}_low"], arrays[f"{key}_high"] = mean_interval(per_path)
    return arrays


def _figures(arrays: dict[str, np.ndarray], unigram: float) -> tuple[Figure, ...]:
    drawn = [Series("this model", "ladder", "rung", style="bars", low="ladder_low", high="ladder_high")]
    if "ladder_untrained" in arrays:
        drawn.append(Series("untrained", "ladder_untrained", "rung", style="bars", dashed=True))
    return (
        Figure(
            "ladder",
            "Loss when the mixing matrices of all layers are replaced",
            "what the model's own patterns are replaced by",
            "nats per token",
            tuple(drawn),
            references={"unigram": unigram},
        ),
        Figure(
            "layers",
            "What it costs to replace the patterns of one layer alone, nats per token",
            "layer",
            "",
            (Series("cost", "layer_cost", "layer", style="heatmap", rows="layer_rung", text="layer_text"),),
        ),
    )


def _conventions(
    subject: Subject, own: Draw, fitted: np.ndarray, best: str, sample: int, defined: bool, kinds: frozenset[str]
) -> dict[str, Any]:
    conventions = {
        "units": "nats per token; the bias is a ratio, never clipped",
        "loss": "-log p of each token after the first, mean over tokens, then paths",
        "cost": "loss with the replacement minus the loss of the model, on the same paths",
        "association_bias": f"cost_{best} / cost_identity, all layers together"
        if defined
        else f"undefined: cost_identity is not significantly positive, or below {COST} nat, or A is conditional",
        "best_fixed": f"{best}, which has the lower loss of {', '.join(FIXED)} on the {len(fitted)} other paths",
        "corpus_mean": f"mean over the {len(fitted)} other paths of the model's own A, by layer, head and position",
        "scale": "rows of A = I and of the causal mean sum to what those of the corpus mean do",
        "shuffled_keys": "each row's weights on the keys up to it in random order, the same for all heads of a layer",
        "other_path": "the pattern that each layer has on the path before, walked undisturbed",
        "layers_alone": f"summed costs of single layers, on {sample} paths, against all layers together on these",
        "unigram": f"law of the tokens of the other paths, with 1 added to each count; {fitted.size} tokens",
        "paths": f"{len(own.tokens)} of {own.tokens.shape[1]} tokens, from {len(np.unique(own.documents))} documents",
        "scope": "a trained model, its patterns taken away; whether they are redundant, training from scratch can say",
    }  # fmt: skip
    if "conditional" in kinds:
        conventions["values"] = "conditional: what A combines depends on the past by itself, and keeps it at every rung"
    if subject.untrained is None:
        conventions["untrained"] = "not available: this model has no step 0"
    return conventions
