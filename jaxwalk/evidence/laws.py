"""Laws over paths compared with the truth step by step: of a model, and of the n-gram model that is its null."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import NotApplicable
from jaxwalk.evidence.subject import Draw, Subject
from jaxwalk.model import Transformer
from jaxwalk.paths import next_log_probs

EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Edges of the probability bins used for calibration."""


def check_data(subject: Subject) -> None:
    """Raise NotApplicable if the subject has no data that its laws could be compared with."""
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs the data that the model was trained on, a world or a text: {subject.no_data}")
    if subject.world is not None and subject.world.vocab_size != subject.model.vocab_size:
        raise NotApplicable(
            f"the world has {subject.world.vocab_size} tokens and the model {subject.model.vocab_size}: "
            "there is no law to compare with"
        )


def held_out(subject: Subject, n: int) -> Draw:
    """At most n held-out paths of N = length + 1 tokens, the last of which is only predicted, and their documents.

    They are shorter if the documents of a text are.
    """
    length = subject.length + 1
    while True:
        try:
            return subject.draw(n, length)
        except NotApplicable:
            if length <= 8:
                raise
            length = length // 2 + 1


class Steps(NamedTuple):
    """Summaries of a law along paths of T+1 tokens. Entry t refers to the step after t+1 tokens.

    The truth is the world's law. Without a world it is the token that followed, so that `kl` is the loss.

    Attributes:
        log_prob: log-probability of the token that followed.
        entropy: entropy of the law.
        kl: KL(truth || law), 0 after a prefix that the world forbids.
        world_log_prob: log-probability of the token that followed under the world's law, 0 after a forbidden prefix.
        world_entropy: entropy of the world's law, 0 after a forbidden prefix.
        bins: [K, 4], for each probability bin: the number of probabilities in it, their sum, the sum of the truth, and
            the variance of that sum expected of a calibrated model. Summed over steps and all tokens.
        top_bins: [K, 4], likewise for the most probable token only.
    """

    log_prob: Any
    entropy: Any
    kl: Any
    world_log_prob: Any
    world_entropy: Any
    bins: Any
    top_bins: Any


def path_steps(law: "Transformer | NGram", path: Int[Array, " N"], world: Any) -> Steps:
    """The `Steps` of one path, with bins."""
    log_p, truth, allowed, steps = _path_steps(law, path, world)
    p = jnp.exp(log_p)
    top = p == p.max(axis=-1, keepdims=True)
    first_top = allowed[:, None] & top & (jnp.cumsum(top, axis=-1) == 1)
    return steps._replace(bins=_binned(p, truth, allowed[:, None]), top_bins=_binned(p, truth, first_top))


def path_steps_without_bins(law: "Transformer | NGram", path: Int[Array, " N"], world: Any) -> Steps:
    """The `Steps` of one path, without bins."""
    return _path_steps(law, path, world)[-1]


def _path_steps(law: "Transformer | NGram", path: Array, world: Any) -> tuple[Array, Array, Array, Steps]:
    """log p [T, V], the truth [T, V], whether the world allows each prefix [T], and the steps without bins."""
    before, after = path[:-1], path[1:]
    index = jnp.arange(len(after))
    log_p = law(before) if isinstance(law, NGram) else next_log_probs(law, before)
    p = jnp.exp(log_p)
    log_prob, entropy = log_p[index, after], -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)
    if world is None:
        truth, allowed = jax.nn.one_hot(after, p.shape[-1], dtype=p.dtype), jnp.ones(len(before), bool)
        terms = -log_prob, jnp.zeros_like(log_prob), jnp.zeros_like(log_prob)
    else:
        log_truth = world.next_log_probs(before)[1:].astype(p.dtype)
        allowed = ~jnp.isnan(log_truth).any(axis=-1)
        truth = jnp.where(allowed[:, None], jnp.exp(log_truth), 0)
        zero = truth == 0  # 0 log 0 = 0
        log_truth_or_0 = jnp.where(zero, 0, log_truth)
        terms = (
            jnp.sum(truth * jnp.where(zero, 0, log_truth_or_0 - log_p), axis=-1),
            jnp.where(allowed, log_truth[index, after], 0),
            -jnp.sum(truth * log_truth_or_0, axis=-1),
        )
    return log_p, truth, allowed, Steps(log_prob, entropy, *terms, None, None)


def _binned(p: Float[Array, "T V"], truth: Float[Array, "T V"], selected: Array) -> Float[Array, "K 4"]:
    values = jnp.stack([jnp.ones_like(p), p, truth])

    def above(edge: Array) -> Array:
        return jnp.sum(jnp.where(selected & (p >= edge), values, 0), axis=2)

    # Bins [K, 3, T] are differences of sums above consecutive edges.
    sums = lax.map(above, jnp.array([*EDGES[:-1], 2.0], p.dtype))
    bins = sums[:-1] - sums[1:]
    # At each step one token follows, so whether it falls into a bin is a Bernoulli variable with the bin's total mass.
    mass = jnp.clip(bins[:, 1:2], 0, 1)
    return jnp.concatenate([bins, mass * (1 - mass)], axis=1).sum(axis=2)


def observe(law: "Transformer | NGram", world: Any, rows: Int[np.ndarray, "n N"], binned: bool = False) -> Steps:
    """The `Steps` of many paths. Models of one shape share one compilation.

    Args:
        law: a model or an n-gram model.
        world: the world whose law is the truth, or None.
        rows: [n, N], the paths.
        binned: whether to compute the bins, which is most of the work for a large vocabulary; otherwise they are None.

    Returns:
        The steps, [n, N - 1] each; bins [n, K, 4].
    """
    function = path_steps if binned else path_steps_without_bins
    return measure(function, law, rows.astype(np.int32), shared=(world,))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["contexts", "laws"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class NGram:
    """An interpolated n-gram model: each order is smoothed towards the order below, the lowest towards uniform.

    Attributes:
        contexts: for each order k, the sorted codes [C_k] of the contexts of k tokens that were seen.
        laws: for each order, log p after each of these contexts, [C_k, V].
    """

    contexts: tuple[Any, ...]
    laws: tuple[Any, ...]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.laws[0].shape[-1]

    @property
    def unigram(self) -> "NGram":
        """The n-gram model of order 0: independent tokens."""
        return NGram(self.contexts[:1], self.laws[:1])

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T V"]:
        """log p(. | tokens up to t), by the longest context that was seen."""
        V = self.vocab_size
        law = jnp.broadcast_to(self.laws[0][0], (len(tokens), V))
        code = jnp.zeros(len(tokens), jnp.int32)
        for k in range(1, len(self.laws)):
            contexts, laws = jnp.asarray(self.contexts[k]), jnp.asarray(self.laws[k])
            back = jnp.roll(tokens, k - 1).astype(jnp.int32)
            code = code + back * V ** (k - 1)
            slot = jnp.clip(jnp.searchsorted(contexts, code), 0, len(contexts) - 1)
            seen = (contexts[slot] == code) & (jnp.arange(len(tokens)) >= k - 1)
            law = jnp.where(seen[:, None], laws[slot], law)
        return law


class _Counts(NamedTuple):
    """How often each token came after each context of k tokens.

    Attributes:
        codes: [C], the sorted codes of the contexts.
        after: [C, V], the counts.
    """

    codes: Int[np.ndarray, " C"]
    after: Int[np.ndarray, "C V"]


def fit_ngrams(
    tokens: Int[np.ndarray, "n T"], segments: Int[np.ndarray, "n T"], V: int, order: int, smoothing: float
) -> NGram:
    """An n-gram model of order up to `order`: p_k(v | c) = (n(c v) + s p_{k-1}(v)) / (n(c) + s).

    Fitting stops early at an order with too many contexts to store.

    Args:
        tokens: [n, T].
        segments: [n, T], the document of each position. Nothing is counted across documents or in padding (segment 0).
        V: the size of the vocabulary.
        order: the largest number of tokens in a context.
        smoothing: s.

    Returns:
        The model, which contains those of all lower orders.
    """
    return _smoothed(_count_contexts(tokens, segments, V, order), V, smoothing)


def _count_contexts(tokens: np.ndarray, segments: np.ndarray, V: int, order: int) -> list[_Counts]:
    """The counts of each order from 0 to `order`, or to the last one that can be stored."""
    counts: list[_Counts] = []
    for k in range(order + 1):
        if V**k > 1 << 30:
            break
        code, after, inside = _context_codes(tokens, segments, V, k)
        codes, index = np.unique(code[inside], return_inverse=True)
        if k and not 0 < len(codes) * V <= 1 << 25:
            break
        if not k:
            codes, index = np.zeros(1, np.int64), np.zeros(inside.sum(), np.int64)
        counts.append(_Counts(codes, np.bincount(index * V + after[inside], minlength=len(codes) * V).reshape(-1, V)))
    return counts


def _smoothed(counts: Sequence[_Counts], V: int, smoothing: float) -> NGram:
    """The interpolated n-gram model of these counts."""
    laws: list[np.ndarray] = []
    law, codes_below = np.full((1, V), 1 / V), np.zeros(1, np.int64)
    for k, (codes, after) in enumerate(counts):
        shorter = codes % V ** max(k - 1, 0)  # the same contexts without their earliest token
        base = law[np.searchsorted(codes_below, shorter)]
        law = (after + smoothing * base) / (after.sum(axis=1, keepdims=True) + smoothing)
        codes_below = codes
        laws.append(np.log(law).astype(np.float32))
    return NGram(tuple(c.codes.astype(np.int32) for c in counts), tuple(laws))


def _context_codes(
    tokens: np.ndarray, segments: np.ndarray, V: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token from the second on: the code of the k before it, itself, and whether all are in one document."""
    code = np.zeros((len(tokens), tokens.shape[1] - 1), np.int64)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    for j in range(k):
        code[:, j:] += tokens[:, : tokens.shape[1] - 1 - j].astype(np.int64) * V**j
        inside[:, :j] = False
        inside[:, j:] &= segments[:, : tokens.shape[1] - 1 - j] == segments[:, 1 + j :]
    return code, tokens[:, 1:], inside


MIN_TOKENS, MAX_TOKENS = 1 << 17, 1 << 22
"""The bounds of the number of tokens that the n-gram model is fitted on."""


def best_ngram(subject: Subject, length: int) -> tuple[NGram, str]:
    """The best n-gram model of as many tokens as the model was trained on, and a description of it.

    Its order and smoothing are those that predict best what it was not fitted on: other paths of a world, other
    documents of a text.

    Args:
        subject: the model, and the data that it was trained on.
        length: the length of the paths that it is compared on, which bounds the order.
    """
    V = subject.model.vocab_size
    budget = min(max(MIN_TOKENS, subject.training_tokens), MAX_TOKENS)
    fit, choice = _sampled_paths(subject, budget, length) if subject.world is not None else _split_text(subject, budget)
    counts = _count_contexts(*fit, V, min(length - 1, 10))
    best = math.inf
    for weight in (1.0, 8.0, 64.0):
        fitted = _smoothed(counts, V, weight)
        losses = _ngram_losses(fitted, *choice, V)
        if min(losses) < best:  # keep only the best in memory
            best, k, smoothing = min(losses), int(np.argmin(losses)), weight
            ngram = NGram(fitted.contexts[: k + 1], fitted.laws[: k + 1])
    seen = f"{subject.training_tokens} were seen in training" if subject.training_tokens else "training is unknown"
    return ngram, (
        f"order {k} (contexts of up to {k} tokens), interpolation weight {smoothing:g}, fitted on {fit[0].size} tokens "
        f"({seen}) and chosen on {choice[0].size} others"
    )


_Text = tuple[np.ndarray, np.ndarray]
"""Tokens [n, T] and the document of each."""


def _sampled_paths(subject: Subject, budget: int, length: int) -> tuple[_Text, _Text]:
    """Fresh paths of the world: `budget` tokens to fit on, and a quarter of them, but at most 2^17, to choose on."""
    key = jax.random.fold_in(jax.random.key(subject.seed), 0x96A3)
    n = max(16, budget // length)
    total, batch = n + max(16, min(n // 4, MIN_TOKENS // length)), max(16, MIN_TOKENS // length)
    parts = [subject.world.sample(jax.random.fold_in(key, i), batch, length) for i in range(-(-total // batch))]
    tokens = np.concatenate([np.asarray(part) for part in parts])[:total]
    segments = np.ones_like(tokens)
    return (tokens[:n], segments[:n]), (tokens[n:], segments[n:])


def _split_text(subject: Subject, budget: int) -> tuple[_Text, _Text]:
    """The beginning of the training text, four fifths of it to fit on, and later documents to choose on."""
    split = subject.store.train
    tokens = np.asarray(split.tokens[: min(len(split.tokens), budget * 5 // 4)])
    starts = np.asarray(split.starts)
    segments = np.searchsorted(starts, np.arange(len(tokens)), side="right")
    share = len(tokens) * 4 // 5
    inner = starts[(starts > 0) & (starts < len(tokens))].tolist()
    border = min(inner, key=lambda start: abs(start - share), default=share)
    return (tokens[None, :border], segments[None, :border]), (tokens[None, border:], segments[None, border:])


def _ngram_losses(ngram: NGram, tokens: np.ndarray, segments: np.ndarray, V: int) -> list[float]:
    """The loss of each order, in nats per token."""
    losses, inside = [], _context_codes(tokens, segments, V, 0)[2]
    log_p = np.zeros(inside.shape)
    for k, (contexts, law) in enumerate(zip(ngram.contexts, ngram.laws, strict=True)):
        code, after, whole = _context_codes(tokens, segments, V, k)
        slot = np.minimum(np.searchsorted(contexts, code), len(contexts) - 1)
        log_p = np.where(whole & (contexts[slot] == code), law[slot, after], log_p)
        losses.append(float(-log_p[inside].mean()))
    return losses


def began_training(paths: Int[np.ndarray, "n N"], training: Int[np.ndarray, "M L"]) -> Bool[np.ndarray, "n N"]:
    """Whether the first t + 1 tokens of each path are those of a path that was trained on."""
    length = min(paths.shape[1], training.shape[1])
    tokens = np.concatenate([training[:, :length], paths[:, :length]]).astype(np.int64)
    seen = np.zeros(paths.shape, bool)
    prefix, V = np.zeros(len(tokens), np.int64), int(np.max(tokens)) + 1
    for t in range(length):
        prefix = np.unique(prefix * V + tokens[:, t], return_inverse=True)[1]  # numbers the distinct prefixes
        seen[:, t] = np.isin(prefix[len(training) :], prefix[: len(training)])
    return seen
