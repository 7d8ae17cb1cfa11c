"""C1 and C2: the model is a random walk over paths, and training makes its law that of the data, over *all* paths.

On a world, whose law is known, the measure is KL(world || model), which is the loss in excess of the observer who
knows the world: exact, by enumeration, as far as paths are few enough, and after that a mean over held-out paths of
the exact KL of each step, which is never negative (a difference of sampled losses may be). Beside it the mass of all
enumerated paths, the mass on paths that the world forbids, and a G-test of sampled against enumerated frequencies.
On text the excess is unknown: there it is the loss, in nats per token and bits per byte. Calibration on both.

Nulls: the untrained model, the best n-gram model (interpolated, as in MacKay and Peto 1995), the uniform law.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.analyses._finding import Figure, Finding, NotApplicable, Series
from jaxwalk.analyses._statistics import batches, bootstrap, g_test, mean_interval
from jaxwalk.analyses._subject import Subject
from jaxwalk.paths import continuations, enumerated_log_probs, next_log_probs, sample_paths
from jaxwalk.transformer import Transformer

CLAIM = (
    "C1, C2: behaviours are paths that the model random-walks, and training learns a distribution over all paths, "
    "not only over those it was trained on."
)
LABELS = {"model": "model", "untrained": "untrained model", "ngram": "best n-gram model"}
EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the bins in which probabilities are compared with what came of them."""


def analyse(
    subject: Subject, *, paths: int | None = None, enumerated: int = 2500, samples: int = 2000, light: bool = False
) -> Finding:
    """How far the model's law over paths is from the data's.

    paths: held-out paths (by default 512 of a world, 128 of text). enumerated: how many are enumerated, at most.
    samples: paths sampled from the model for the G-test. light: only the numbers that `training_walk` follows,
    held against the uniform law alone.
    """
    world = subject.world
    check_data(subject)
    if light:
        paths, enumerated = paths or (256 if world else 64), min(enumerated, 300)
    held_out = held_out_paths(subject, paths or (512 if world else 128))
    laws: dict[str, Transformer | NGram] = {"model": subject.model}
    conventions: dict[str, Any] = {
        "units": "nats; probabilities where named a mass, a p-value or a calibration error",
        "paths": len(held_out),
        "tokens_per_path": held_out.shape[1],
        "position": "number of tokens given, from 1; the first token is never scored",
        "intervals": "95%, bootstrap over paths; enumerated numbers have none",
        "nulls": "the plain names are nulls of the first measured number, the others of the number before the dot",
    }
    if not light:
        if subject.untrained is not None:
            laws["untrained"] = subject.untrained
        ngram, chosen = _best_ngram(subject, held_out.shape[1])
        laws["ngram"] = ngram
        conventions["ngram"] = chosen
    sampled = {name: observe(law, world, held_out) for name, law in laws.items()}

    measure = _on_text if world is None else functools.partial(_on_world, budget=enumerated)
    parts = measure(subject, laws, sampled, held_out)
    parts = parts.joined(_calibration(sampled, exact=world is not None))
    if not light:
        parts = parts.joined(_sampling(subject, laws, held_out, samples))
    return Finding(
        name="path_law",
        claim=CLAIM,
        measured=parts.measured,
        interval=parts.interval,
        null=parts.null,
        conventions={**conventions, **parts.conventions},
        arrays=parts.arrays,
        figures=parts.figures,
        verdict=parts.verdict,
    )


# Data, and what is kept of a law along a path. `narrowing` uses these too.


def check_data(subject: Subject) -> None:
    """Raises NotApplicable where the subject has no data that its laws could be held against."""
    if subject.world is None and subject.store is None:
        raise NotApplicable("it needs the data that the model was trained on: a world, or a store of text")
    if subject.world is not None and subject.world.vocab_size != subject.model.vocab_size:
        raise NotApplicable(
            f"the world has {subject.world.vocab_size} tokens and the model {subject.model.vocab_size}: "
            "there is no law to compare with"
        )


def held_out_paths(subject: Subject, n: int) -> Int[np.ndarray, "n N"]:
    """n held-out paths of N = max_length + 1 tokens, the last of which is only predicted; shorter if documents are."""
    length = subject.model.max_length + 1
    while True:
        try:
            return np.asarray(subject.paths(n, length))
        except ValueError as error:
            if length <= 8:
                raise NotApplicable(str(error)) from error
            length = length // 2 + 1


class Steps(NamedTuple):
    """What is kept of a model's law along paths of T+1 tokens. Entry t is about the step after t+1 tokens.

    log_prob: of the token that came. entropy: of the law. kl: KL(truth || law). world_log_prob, world_entropy: of
    the truth. The truth is the world's law, and 0 is kept after a prefix that the world forbids; without a world
    it is the token that came, so that `kl` is the loss. bins, top_bins: [K, 4], summed over steps: number of
    probabilities, their sum, the summed truth, and the variance that a calibrated model expects of it; for all
    tokens, and for the most probable one only.
    """

    log_prob: Any
    entropy: Any
    kl: Any
    world_log_prob: Any
    world_entropy: Any
    bins: Any
    top_bins: Any


@jax.jit
def _observe(law: "Transformer | NGram", world: Any, rows: Int[Array, "B N"]) -> Steps:
    def one(row: Array) -> Steps:
        before, after = row[:-1], row[1:]
        index = jnp.arange(len(after))
        log_p = law(before) if isinstance(law, NGram) else next_log_probs(law, before)
        p = jnp.exp(log_p)
        if world is None:
            log_truth = jnp.where(after[:, None] == jnp.arange(p.shape[-1]), 0.0, -jnp.inf)
            possible = jnp.ones(len(before), bool)
        else:
            log_truth = world.next_log_probs(before)[1:].astype(p.dtype)
            possible = ~jnp.isnan(log_truth).any(axis=-1)
        truth = jnp.where(possible[:, None], jnp.exp(log_truth), 0)
        zero = truth == 0  # 0 log 0 = 0
        safe = jnp.where(zero, 0, log_truth)
        top = p == p.max(axis=-1, keepdims=True)
        return Steps(
            log_p[index, after],
            -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1),
            jnp.sum(truth * jnp.where(zero, 0, safe - log_p), axis=-1),
            jnp.where(possible, log_truth[index, after], 0),
            -jnp.sum(truth * safe, axis=-1),
            _binned(p, truth, possible[:, None]),
            _binned(p, truth, possible[:, None] & top & (jnp.cumsum(top, axis=-1) == 1)),
        )

    return jax.vmap(one)(rows)


def _binned(p: Float[Array, "T V"], truth: Float[Array, "T V"], kept: Array) -> Float[Array, "K 4"]:
    values = jnp.stack([jnp.ones_like(p), p, truth])

    def above(edge: Array) -> Array:
        return jnp.sum(jnp.where(kept & (p >= edge), values, 0), axis=2)

    # A sum above each edge; their differences are the bins, [K, 3, T].
    sums = lax.map(above, jnp.array([*EDGES[:-1], 2.0], p.dtype))
    bins = sums[:-1] - sums[1:]
    # Only one token comes at a step, so what comes in a bin is 0 or 1, however many tokens are in it.
    given = jnp.clip(bins[:, 1:2], 0, 1)
    return jnp.concatenate([bins, given * (1 - given)], axis=1).sum(axis=2)


def batch_size(law: "Transformer | NGram", length: int) -> int:
    """How many paths are walked together, so that the largest array in the way has about 2^22 elements."""
    widest = max(law.vocab_size, 4 * length, 0 if isinstance(law, NGram) else 4 * law.width)
    return 1 << max(0, min(256, (1 << 22) // (length * widest)).bit_length() - 1)


def in_batches(function: Callable[..., Any], batch: int, *per_path: np.ndarray) -> Any:
    """`function` of arrays with paths as first axis, over batches of one shape; results in float64 on the host."""
    parts = []
    for together in zip(*(batches(a, batch) for a in per_path), strict=True):
        count = together[0][1]
        part = function(*(a for a, _ in together))
        parts.append(jax.tree.map(lambda a, count=count: np.asarray(a, np.float64)[:count], part))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def observe(law: "Transformer | NGram", world: Any, rows: Int[np.ndarray, "n N"]) -> Steps:
    """`Steps` of many paths, in bounded memory; models of one shape share one compilation."""
    batch = batch_size(law, rows.shape[1] - 1)
    return in_batches(functools.partial(_observe, law, world), batch, rows.astype(np.int32))


@dataclasses.dataclass
class _Parts:
    """A part of a finding."""

    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    interval: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    null: dict[str, float] = dataclasses.field(default_factory=dict)
    conventions: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    verdict: str = ""

    def joined(self, other: "_Parts") -> "_Parts":
        return _Parts(
            *(
                getattr(self, f.name) | getattr(other, f.name)
                if isinstance(getattr(self, f.name), dict)
                else getattr(self, f.name) + getattr(other, f.name)
                for f in dataclasses.fields(self)
            )
        )


# Against a world.


def _on_world(
    subject: Subject, laws: dict[str, Any], sampled: dict[str, Steps], held_out: np.ndarray, budget: int
) -> _Parts:
    world, V, T = subject.world, subject.model.vocab_size, held_out.shape[1] - 1
    m = max(1, min(T, int(math.log(budget) / math.log(max(V, 2)) + 1e-9)))
    prefixes = continuations(V, m)
    rows = np.concatenate([prefixes, np.zeros((len(prefixes), T + 1 - m), prefixes.dtype)], axis=1)
    exact = {name: observe(law, world, rows) for name, law in laws.items()}
    first = np.asarray(world.next_log_probs(np.zeros(0, np.int32))[0], np.float64)[prefixes[:, 0]]
    log_world = first + exact["model"].world_log_prob[:, : m - 1].sum(axis=1)
    world_mass = np.exp(log_world)
    out = _Parts(conventions={
        "enumerated": f"all {V}^{m} paths of {m} tokens, the first drawn from the world and given to both",
        "excess_loss": f"mean over {T} positions of E KL(world || model): exact up to position {m}, "
        "after that a mean over held-out paths",
        "kl_total": "over the enumerated paths, in nats per path",
    })  # fmt: skip
    allowed = world_mass > 0
    by_position = {}
    for name in laws:
        log_model = first + exact[name].log_prob[:, : m - 1].sum(axis=1)
        by_position[name] = np.concatenate([world_mass @ exact[name].kl[:, :m], sampled[name].kl[:, m:].mean(axis=0)])
        numbers = {
            "excess_loss": by_position[name].mean(),
            "kl_total": world_mass[allowed] @ (log_world - log_model)[allowed],
            "mass_off_support": np.exp(log_model[~allowed]).sum(),
            "total_mass": np.exp(log_model).sum(),
        }
        for key, value in numbers.items():
            if name == "model":
                out.measured[key] = float(value)
            elif key != "total_mass":
                out.null[name if key == "excess_loss" else f"{key}.{name}"] = float(value)
    out.null["uniform"] = float(np.log(V) - np.concatenate([
        world_mass @ exact["model"].world_entropy[:, :m], sampled["model"].world_entropy[:, m:].mean(axis=0)
    ]).mean())  # fmt: skip
    out.null["mass_off_support.world"], out.null["total_mass.exact"] = 0.0, 1.0

    low, high = by_position["model"].copy(), by_position["model"].copy()
    if m < T:
        beyond = sampled["model"].kl[:, m:]
        low[m:], high[m:] = mean_interval(beyond)
        share = by_position["model"][:m].sum()
        ends = mean_interval(beyond.sum(axis=1))
        out.interval["excess_loss"] = (float((share + ends[0]) / T), float((share + ends[1]) / T))
    out.arrays |= {"position": np.arange(1, T + 1), "kl_low": low, "kl_high": high}
    out.arrays |= {f"kl_{name}": values for name, values in by_position.items()}
    out.figures = (_position_figure(by_position, "kl", "How far the model's next-step law is from the world's"),)
    out.verdict = f"The model's law is {out.measured['excess_loss']:.2g} nats per token from the world's" + _against(
        out.null, "nats"
    )
    if (~allowed).any():
        out.verdict += f" {out.measured['mass_off_support']:.2g} of its mass lies on paths that the world forbids."
    return out


def _against(null: dict[str, float], unit: str) -> str:
    names = {
        "untrained": "untrained",
        "ngram": "the best n-gram model",
        "unigram": "unigram",
        "uniform": "the uniform law",
    }
    return " (" + ", ".join(f"{text} {null[k]:.3g}" for k, text in names.items() if k in null) + f" {unit})."


def _position_figure(by_position: dict[str, np.ndarray], what: str, title: str) -> Figure:
    return Figure(
        name=f"{what}_by_position",
        title=title,
        x_label="tokens given",
        y_label="E KL(world ‖ model), nats" if what == "kl" else "loss, nats per token",
        series=tuple(
            Series(
                LABELS[name],
                f"{what}_{name}",
                "position",
                low=f"{what}_low" if name == "model" else None,
                high=f"{what}_high" if name == "model" else None,
                dashed=name != "model",
            )
            for name in by_position
        ),
        log_y=what == "kl" and all((values > 0).all() for values in by_position.values()),
    )


# Against text.


def _on_text(subject: Subject, laws: dict[str, Any], sampled: dict[str, Steps], held_out: np.ndarray) -> _Parts:
    T = held_out.shape[1] - 1
    bits = 1 / (math.log(2) * float(subject.store.bytes_per_token()))
    losses = {name: steps.kl for name, steps in sampled.items()}
    per_path = losses["model"].mean(axis=1)
    low, high = (float(end) for end in mean_interval(per_path))
    out = _Parts(
        measured={"loss": float(per_path.mean()), "bits_per_byte": float(per_path.mean() * bits)},
        interval={"loss": (low, high), "bits_per_byte": (low * bits, high * bits)},
        null={"uniform": math.log(subject.model.vocab_size)},
        conventions={
            "loss": f"nats per token, mean over {T} positions of windows of the validation split within one document",
            "bytes_per_token": float(subject.store.bytes_per_token()),
            "excess_loss": "unknown: the law of text is",
        },
    )
    for name in laws:
        if name != "model":
            out.null[name] = float(losses[name].mean())
    if "ngram" in laws:
        out.null["unigram"] = float(-np.asarray(laws["ngram"].laws[0][0], np.float64)[held_out[:, 1:]].mean())
    out.null |= {f"bits_per_byte.{name}": value * bits for name, value in out.null.items()}
    by_position = {name: loss.mean(axis=0) for name, loss in losses.items()}
    out.arrays |= {"position": np.arange(1, T + 1)} | {f"loss_{name}": v for name, v in by_position.items()}
    out.arrays["loss_low"], out.arrays["loss_high"] = mean_interval(losses["model"])
    out.figures = (_position_figure(by_position, "loss", "Loss on held-out text against the number of tokens given"),)
    out.verdict = (
        f"Held-out text costs {out.measured['loss']:.3f} nats per token, "
        f"{out.measured['bits_per_byte']:.3f} bits per byte" + _against(out.null, "nats")
    )
    return out


# Calibration.


def _calibration(sampled: dict[str, Steps], exact: bool) -> _Parts:
    """Expected calibration error: summed over bins, |probability given - what came of it|, per step."""

    def error(bins: np.ndarray) -> float:
        total = bins.sum(axis=0)
        return float(np.abs(total[:, 1] - total[:, 2]).sum() / steps / len(bins))

    steps = sampled["model"].kl.shape[1]
    out = _Parts(conventions={
        "calibration": "all tokens, and the most probable one (top); probability mass per step, in bins with edges "
        + ", ".join(f"{edge:g}" for edge in EDGES)
        + ("; against the world's exact probabilities" if exact else "; against the tokens that came"),
    })  # fmt: skip
    for key, of in (("calibration_error", "bins"), ("top_calibration_error", "top_bins")):
        for name, observed in sampled.items():
            bins = getattr(observed, of)
            if name != "model":
                out.null[f"{key}.{name}"] = error(bins)
                continue
            out.measured[key] = error(bins)
            out.interval[key] = bootstrap(error, bins)  # type: ignore[assignment]
            # What a calibrated model would score: with samples for truth, the mean of |normal| in each bin.
            spread = np.sqrt(2 / np.pi * np.maximum(bins.sum(axis=0)[:, 3], 0)).sum() / steps / len(bins)
            out.null[f"{key}.calibrated"] = 0.0 if exact else float(spread)
    series = []
    for name, observed in sampled.items():
        total = observed.bins.sum(axis=0)
        total = total[total[:, 0] > 0.5]
        out.arrays[f"calibration_given_{name}"] = total[:, 1] / total[:, 0]
        out.arrays[f"calibration_came_{name}"] = total[:, 2] / total[:, 0]
        out.arrays[f"calibration_count_{name}"] = total[:, 0]
        series.append(
            Series(LABELS[name], f"calibration_came_{name}", f"calibration_given_{name}", dashed=name != "model")
        )
    out.arrays["calibration_diagonal"] = np.array([0.0, 1.0])
    series.append(Series("calibrated", "calibration_diagonal", "calibration_diagonal", dashed=True))
    out.figures = (
        Figure(
            name="calibration",
            title="Do tokens come as often as the model says?",
            x_label="probability given",
            y_label="the world's probability" if exact else "share that came",
            series=tuple(series),
            equal_aspect=True,
        ),
    )
    return out


# Sampling.


@functools.partial(jax.jit, static_argnames=("steps", "n"))
def _sampled_and_enumerated(
    model: Transformer, prompt: Int[Array, " P"], key: Array, steps: int, n: int
) -> tuple[Int[Array, "n steps"], Float[Array, " N"]]:
    tokens = sample_paths(model, prompt, key, steps, n).tokens
    if steps == 1:
        return tokens, next_log_probs(model, prompt)[-1]
    return tokens, enumerated_log_probs(model, prompt, steps)[1]


def _sampling(subject: Subject, laws: dict[str, Any], held_out: np.ndarray, samples: int) -> _Parts:
    """The model's samples, by the recurrent form, against its enumerated law, by the parallel form."""
    V, T = subject.model.vocab_size, held_out.shape[1] - 1
    steps = max(1, min(T - 1, int(math.log(samples / 8) / math.log(max(V, 2)))))
    first = np.bincount(held_out[:, 0], minlength=V).argmax(keepdims=True)
    key = jax.random.key(subject.seed)
    tokens, law = _sampled_and_enumerated(subject.model, first, key, steps, samples)
    counts = np.bincount(np.asarray(tokens, np.int64) @ V ** np.arange(steps)[::-1], minlength=V**steps)
    law = np.exp(np.asarray(law, np.float64))
    out = _Parts(arrays={"sampled_counts": counts, "enumerated_law": law})
    try:  # impossible where the law leaves no choice
        G, cells, p = g_test(counts, law)
    except ValueError as error:
        out.conventions["g_test"] = f"none: {error}"
        return out
    out.measured["g_test_p"] = p
    out.null["g_test_p.expected"] = 0.5
    out.conventions["g_test"] = (
        f"{samples} sampled continuations by {steps} of token {int(first[0])} against their enumerated law, "
        f"G = {G:.1f} with {cells} degrees of freedom, rare cells pooled; for a correct sampler p is uniform in 0..1 "
        "(below 0.05 in one run of 20)"
    )
    if "untrained" in laws:
        law = np.exp(np.asarray(_sampled_and_enumerated(laws["untrained"], first, key, steps, samples)[1], np.float64))
        out.null["g_test_p.untrained"] = g_test(counts, law)[2]
        out.conventions["g_test"] += "; untrained: the same samples against the untrained model's law"
    out.verdict = f" Sampled paths come as often as enumerated (G-test p = {p:.2g})." if p >= 0.01 else (
        f" Sampled paths differ from the enumerated law (G-test p = {p:.2g})."
    )  # fmt: skip
    return out


# The n-gram null.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["contexts", "laws"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class NGram:
    """An interpolated n-gram model: each order is smoothed towards the one below it, the lowest towards uniform.

    contexts: of each order k, the codes, in order, of the contexts of k tokens that were seen, [C_k].
    laws: of each order, log p after each of these contexts, [C_k, V].
    """

    contexts: tuple[Any, ...]
    laws: tuple[Any, ...]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.laws[0].shape[-1]

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T V"]:
        """log p(. | tokens up to t): by the longest context that was seen."""
        V = self.vocab_size
        law = jnp.broadcast_to(self.laws[0][0], (len(tokens), V))
        code = jnp.zeros(len(tokens), jnp.int32)
        for k in range(1, len(self.laws)):
            back = jnp.roll(tokens, k - 1).astype(jnp.int32)
            code = code + back * V ** (k - 1)
            slot = jnp.clip(jnp.searchsorted(self.contexts[k], code), 0, len(self.contexts[k]) - 1)
            seen = (self.contexts[k][slot] == code) & (jnp.arange(len(tokens)) >= k - 1)
            law = jnp.where(seen[:, None], self.laws[k][slot], law)
        return law


def fit_ngrams(
    tokens: Int[np.ndarray, "n T"], segments: Int[np.ndarray, "n T"], V: int, order: int, smoothing: float
) -> NGram:
    """The n-gram models of order 0 to at most `order`, in one: p_k(v | c) = (n(c v) + s p_{k-1}(v)) / (n(c) + s).

    Nothing is counted across a border of segments, nor in padding (segment 0). Stops at an order with too many
    contexts to hold.
    """
    contexts, laws = [np.zeros(1, np.int32)], []
    law, below = np.full((1, V), 1 / V), np.zeros(1, np.int64)
    for k in range(order + 1):
        if V**k > 1 << 30:
            break
        code, after, inside = _context_codes(tokens, segments, V, k)
        seen, index = np.unique(code[inside], return_inverse=True)
        if k and not 0 < len(seen) * V <= 1 << 25:
            break
        counts = np.bincount(index * V + after[inside], minlength=len(seen) * V).reshape(-1, V)
        if k:
            base = law[np.searchsorted(below, seen % V ** (k - 1))]  # the same context without its earliest token
            contexts.append(seen.astype(np.int32))
        else:
            base = law
        law = (counts + smoothing * base) / (counts.sum(axis=1, keepdims=True) + smoothing)
        below = seen
        laws.append(np.log(law).astype(np.float32))
    return NGram(tuple(contexts), tuple(laws))


def _context_codes(
    tokens: np.ndarray, segments: np.ndarray, V: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token from the second on: the code of the k before it, itself, whether these lie in one document."""
    code = np.zeros((len(tokens), tokens.shape[1] - 1), np.int64)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    for j in range(k):
        code[:, j:] += tokens[:, : tokens.shape[1] - 1 - j].astype(np.int64) * V**j
        inside[:, :j] = False
        inside[:, j:] &= segments[:, : tokens.shape[1] - 1 - j] == segments[:, 1 + j :]
    return code, tokens[:, 1:], inside


def _best_ngram(subject: Subject, length: int, budget: int = 1 << 17) -> tuple[NGram, str]:
    """The order and smoothing that predict best, fitted and chosen on data of their own, and a sentence on them."""
    V = subject.model.vocab_size
    fresh = 5 * max(16, budget // length // 4)
    if subject.world is not None:
        key = jax.random.fold_in(jax.random.key(subject.seed), 0x96A3)
        tokens = np.asarray(subject.world.sample(key, fresh, length))
        segments = np.ones_like(tokens)
    else:
        tokens, segments = (np.asarray(a) for a in subject.store.batch(subject.seed, 0, fresh, length, split="train"))
    fit, choose = slice(0, fresh * 4 // 5), slice(fresh * 4 // 5, None)
    order = min(length - 1, 10)
    best = math.inf
    for weight in (1.0, 8.0, 64.0):
        fitted = fit_ngrams(tokens[fit], segments[fit], V, order, weight)
        losses = _ngram_losses(fitted, tokens[choose], segments[choose], V)
        if min(losses) < best:  # and only one is held
            best, k, smoothing = min(losses), int(np.argmin(losses)), weight
            ngram = NGram(fitted.contexts[: k + 1], fitted.laws[: k + 1])
    return ngram, (
        f"order {k} (contexts of up to {k} tokens), interpolation weight {smoothing:g}, fitted on "
        f"{tokens[fit].size} tokens and chosen on {tokens[choose].size} others"
    )


def _ngram_losses(ngram: NGram, tokens: np.ndarray, segments: np.ndarray, V: int) -> list[float]:
    """Loss of each order, in nats per token."""
    losses, inside = [], _context_codes(tokens, segments, V, 0)[2]
    log_p = np.zeros(inside.shape)
    for k, (contexts, law) in enumerate(zip(ngram.contexts, ngram.laws, strict=True)):
        code, after, whole = _context_codes(tokens, segments, V, k)
        slot = np.minimum(np.searchsorted(contexts, code), len(contexts) - 1)
        log_p = np.where(whole & (contexts[slot] == code), law[slot, after], log_p)
        losses.append(float(-log_p[inside].mean()))
    return losses
