"""C1 and C2: the model is a random walk over paths, and training makes its law that of the data, over *all* paths.

On a world, whose law is known, the measure is KL(world || model), which is the loss in excess of the observer who
knows the world: exact, by enumeration, as far as paths are few enough, and after that a mean over held-out paths of
the exact KL of each step, which is never negative (a difference of sampled losses may be). On text the excess is
unknown: there it is the loss, in nats per token and bits per byte. Calibration on both.

Three contrasts decide. The law is nearer to the data's than that of the best n-gram model (interpolated, as in MacKay
and Peto 1995) of as many tokens, or, where that leaves nothing to gain, all but the world's. What was learned holds
after contexts that did not occur in training: whether a context of probability p is among M training paths is chance,
with probability 1 - (1-p)^M, so that weighting by these propensities (Li, Morgan and Zaslavsky 2018) makes contexts
that did and did not occur alike in everything else. And walks of the model visit tokens as often as the data's.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.decision import Check, Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.engine import ELEMENTS, measure
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import EDGES, NGram, Steps, began_training, best_ngram, check_data, held_out, observe
from jaxwalk.evidence.statistics import g_test, mean_interval
from jaxwalk.evidence.subject import Draw, Subject
from jaxwalk.model import Transformer
from jaxwalk.paths import continuations, enumerated_log_probs, next_log_probs, sample_paths

CLAIM = (
    "C1, C2: behaviours are paths that the model random-walks, and training learns a distribution over all paths, "
    "not only over those it was trained on."
)
LABELS = {
    "model": "model",
    "untrained": "untrained model",
    "ngram": "best n-gram model",
    "unigram": "independent tokens",
}

NEARER = 1e-3
"""Nats per token: ten times the spread over seeds of a small model that is trained on a small world."""
NEARER_ON_TEXT = 0.01
"""Nats per token: a hundredth of the perplexity, the least that scaling studies of small models tell apart."""
NGRAM_ROOM = 5e-3
"""Nats per token that the n-gram model must miss: below, it knows the law itself, and being no nearer says nothing."""
LEARNABLE = 0.01
"""Nats per token that contexts must tell: with less, all laws are near the world's, and a share of it is noise."""
SHARE_LEFT = 0.05
"""The share of what contexts tell that may be left to learn: a model that misses more has missed some structure."""
SHARE_ON_UNSEEN = 0.9
"""The share of the gain that must hold where nothing was seen: a law of all paths has all of it, memory has none."""
FEWEST_BY_CHANCE = 16
"""The fewest paths, effectively, on either side of the comparison of contexts that occurred in training or did not."""
SHARE_OF_VISITS = {"world": 0.1, "text": 0.95}
"""The share of the error of base rates that walks may have: a tenth of what contexts change on a world. On text, where
most of the error is chance, context must explain the least share that is visible in what is generated."""
VISITS_ROOM = 0.01
"""The variance over contexts, summed over tokens, that visits must have: a standard deviation of 0.1 in one token."""
MOST_TRAINING_TOKENS = 1 << 26
"""The most tokens of training that are drawn again."""
CONTINUATIONS = 1000
"""The most continuations of each context that are enumerated to know how often the world visits a token."""
LONGEST_PROMPT, STEPS_ON_TEXT = 32, 8
"""The tokens of a context that is continued, at most, and the steps of continuations of text."""
PROMPTS, WALKS = 64, {"world": 64, "text": 16}
"""The number of contexts, and of sampled walks after each: of text few, as models of text are large."""
BASE_PATHS = 4096
"""The paths that base rates are taken from."""


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
    drawn = held_out(subject, paths or (512 if world else 128))
    laws: dict[str, Transformer | NGram] = {"model": subject.model}
    conventions: dict[str, Any] = {
        "units": "nats; probabilities where named a mass, a calibration error or an error of visits",
        "paths": len(drawn.tokens),
        "tokens_per_path": drawn.tokens.shape[1],
        "position": "number of tokens given, from 1; the first token is never scored",
    }
    if not light:
        if subject.untrained is not None:
            laws["untrained"] = subject.untrained
        ngram, conventions["ngram"] = best_ngram(subject, drawn.tokens.shape[1])
        laws |= {"ngram": ngram, "unigram": ngram.unigram}
    steps = {name: observe(law, world, drawn.tokens, binned=True) for name, law in laws.items()}
    if world is None:
        parts = [_on_text(subject, steps, drawn)]
    else:
        parts = [_on_world(subject, laws, steps, enumerated)]
        if not light:
            parts.append(_on_unseen(subject, steps, drawn.tokens))
    parts.append(_calibration(steps, drawn, exact=world is not None))
    if not light:
        parts += [_visits(subject, laws, drawn), _sampler(subject, drawn.tokens, samples)]
    quantities = [quantity for part in parts for quantity in part.quantities]
    name, value = quantities[0].name, quantities[0].value
    return Finding(
        name="path_law",
        claim=CLAIM,
        **numbers(quantities),
        conventions=conventions | _merged(part.conventions for part in parts),
        arrays=_merged(part.arrays for part in parts),
        figures=tuple(figure for part in parts for figure in part.figures),
        verdict=f"{name.replace('_', ' ').capitalize()}: {value:.3g} nats per token.",
        primary=tuple(contrast for part in parts for contrast in part.primary) if not light else (),
        checks=tuple(check for part in parts for check in part.checks),
    )


@dataclasses.dataclass
class _Part:
    """A part of the finding."""

    quantities: list[Quantity] = dataclasses.field(default_factory=list)
    primary: list[Contrast] = dataclasses.field(default_factory=list)
    checks: list[Check] = dataclasses.field(default_factory=list)
    conventions: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    figures: list[Figure] = dataclasses.field(default_factory=list)


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


# Against a world.


def _on_world(subject: Subject, laws: dict[str, Any], steps: dict[str, Steps], budget: int) -> _Part:
    """The excess loss, and what is known of all paths that can be enumerated."""
    world, V, T = subject.world, subject.model.vocab_size, steps["model"].kl.shape[1]
    m = max(1, min(T, int(math.log(budget) / math.log(max(V, 2)) + 1e-9)))
    prefixes = continuations(V, m)
    rows = np.concatenate([prefixes, np.zeros((len(prefixes), T + 1 - m), prefixes.dtype)], axis=1)
    exact = {name: observe(law, world, rows, binned=True) for name, law in laws.items()}  # as above: one program
    log_first = _log_first(world)[prefixes[:, 0]]
    log_world = log_first + exact["model"].world_log_prob[:, : m - 1].sum(axis=1)
    mass = np.exp(log_world)

    def by_path(values: dict[str, np.ndarray]) -> Any:
        """The mean over positions for each path, exact up to position m; one number if all are."""
        known = float((mass @ values["exact"][:, :m]).sum())
        return known / T if m == T else (known + values["sampled"][:, m:].sum(axis=1)) / T

    excess = {name: by_path({"exact": exact[name].kl, "sampled": steps[name].kl}) for name in laws}
    left = by_path({"exact": exact["model"].world_entropy, "sampled": steps["model"].world_entropy})
    quantity = Quantity("excess_loss", excess.pop("model"), excess | {"uniform": math.log(V) - left})
    out = _Part([quantity])
    allowed = mass > 0
    if m > 1:
        log_model = {name: log_first + exact[name].log_prob[:, : m - 1].sum(axis=1) for name in laws}
        kl = {name: float(mass[allowed] @ (log_world[allowed] - log_p[allowed])) for name, log_p in log_model.items()}
        off = {name: float(np.exp(log_p[~allowed]).sum()) for name, log_p in log_model.items()}
        total = float(np.exp(log_model["model"]).sum())
        out.quantities += [
            Quantity("kl_total", kl.pop("model"), kl),
            Quantity("mass_off_support", off.pop("model"), off | {"world": 0.0}, "probability"),
            Quantity("total_mass", total, {"exact": 1.0}, "probability"),
        ]
        out.checks = [Check("total_mass", abs(total - 1), 1e-5, "the probabilities of all enumerated paths sum to one")]
    out.primary = [_nearer_than_ngrams(quantity)] if "ngram" in laws else []
    out.conventions = {
        "enumerated": f"all {V}^{m} paths of {m} tokens, the first drawn from the world and given to both",
        "excess_loss": f"mean over {T} positions of E KL(world || model): exact up to position {m}, after that a mean "
        "over held-out paths",
    }
    by_position = {
        name: np.concatenate([mass @ exact[name].kl[:, :m], steps[name].kl[:, m:].mean(axis=0)]) for name in laws
    }
    low, high = by_position["model"].copy(), by_position["model"].copy()
    if m < T:
        low[m:], high[m:] = mean_interval(steps["model"].kl[:, m:])
    out.arrays = _arrays_by_position("kl", by_position, low, high)
    out.figures = [_position_figure(by_position, "kl", "How far the model's next-step law is from the world's")]
    return out


def _log_first(world: Any) -> Float[np.ndarray, " V"]:
    """The world's law of the first token."""
    return np.asarray(world.next_log_probs(np.zeros(0, np.int32))[0], np.float64)


def _nearer_than_ngrams(excess: Quantity) -> Contrast:
    """C2: the law against the best n-gram model; where that is near the world's law itself, against the world's."""
    statement = "the law over paths is nearer to the world's than that of the best n-gram model"
    if excess.references["ngram"] >= NGRAM_ROOM:
        return excess.contrast("ngram", "C2", statement, at_most=-NEARER, label=LABELS["ngram"])
    statement = f"the law over paths is the world's, but for {SHARE_LEFT:.0%} of what contexts tell at most"
    if (learnable := excess.references["unigram"]) < LEARNABLE:
        return untestable("C2", statement, excess.name, f"contexts tell only {learnable:.2g} nats per token")
    left = dataclasses.replace(excess, nulls={"left": SHARE_LEFT * np.asarray(excess.nulls["unigram"])})
    return left.contrast("left", "C2", statement, at_most=0.0, label=f"{SHARE_LEFT:.0%} of that of independent tokens")


GENERALISES = f"at least {SHARE_ON_UNSEEN:.0%} of what was learned holds after contexts that did not occur in training"


def _on_unseen(subject: Subject, steps: dict[str, Steps], paths: np.ndarray) -> _Part:
    """C2: what was learned, after contexts that began a path of training and after those that did not, by chance."""
    cannot = functools.partial(untestable, "C2", GENERALISES, "gain_unseen")
    if subject.training_paths is None or subject.training_tokens > MOST_TRAINING_TOKENS:
        which = "are unknown" if subject.training_paths is None else "are too many"
        return _Part(primary=[cannot(f"the paths that it was trained on {which}")])
    training = np.asarray(subject.training_paths(subject.step or 0))
    if len(training) < len(paths):
        return _Part(primary=[cannot(f"it was trained on {len(training)} paths, fewer than are held out")])
    kl, gain = steps["model"].kl, steps["unigram"].kl - steps["model"].kl
    log_p = np.cumsum(steps["model"].world_log_prob, axis=1)
    log_p = _log_first(subject.world)[paths[:, :1]] + np.concatenate([np.zeros((len(paths), 1)), log_p[:, :-1]], axis=1)
    occurs = -np.expm1(len(training) * np.log1p(-np.minimum(np.exp(log_p), 1 - 1e-12)))
    occurred = began_training(paths[:, :-1], training)
    weights = {"unseen": np.where(occurred, 0, occurs), "seen": np.where(occurred, 1 - occurs, 0)}
    effective = {k: float(w.sum() ** 2 / np.maximum((w.sum(axis=1) ** 2).sum(), 1e-300)) for k, w in weights.items()}
    if min(effective.values()) < FEWEST_BY_CHANCE:
        few = min(effective, key=effective.__getitem__)
        return _Part(primary=[cannot(f"too few of the held-out contexts are {few} by chance")])

    def weighted(values: np.ndarray) -> dict[str, np.ndarray]:
        return {k: np.stack([(w * values).sum(axis=1), w.sum(axis=1)], axis=1) for k, w in weights.items()}

    gains, excess = weighted(gain), weighted(kl)
    gained = Quantity("gain_unseen", gains["unseen"], {"seen": gains["seen"]}, statistic=_ratio)
    most = dataclasses.replace(gained, nulls={"most": gains["seen"] * [SHARE_ON_UNSEEN, 1]})
    label = f"{SHARE_ON_UNSEEN:.0%} of the gain after those that did"
    return _Part(
        quantities=[gained, Quantity("excess_unseen", excess["unseen"], {"seen": excess["seen"]}, statistic=_ratio)],
        primary=[most.contrast("most", "C2", GENERALISES, at_least=0.0, label=label)],
        conventions={
            "unseen": f"contexts that are not the beginning of any of the {len(training)} paths of training, weighted "
            "by their probability to be; seen: the beginnings of one, weighted by their probability not to be",
            "gain_unseen": "excess loss of independent tokens minus that of the model",
        },
    )


def _ratio(means: np.ndarray) -> Any:
    return means[..., 0] / means[..., 1]


# Against text.


def _on_text(subject: Subject, steps: dict[str, Steps], drawn: Draw) -> _Part:
    """The loss on held-out windows."""
    T, losses = steps["model"].kl.shape[1], {name: each.kl for name, each in steps.items()}
    bytes_per_token = float(subject.store.bytes_per_token())
    bits = 1 / (math.log(2) * bytes_per_token)
    means = {name: values.mean(axis=1) for name, values in losses.items()}
    nulls = {name: values for name, values in means.items() if name != "model"}
    nulls |= {"uniform": math.log(subject.model.vocab_size)}
    loss = Quantity("loss", means["model"], nulls, documents=drawn.documents)
    scaled = {name: values * bits for name, values in nulls.items()}
    bits_per_byte = Quantity("bits_per_byte", means["model"] * bits, scaled, "bits per byte", documents=drawn.documents)
    statement = "the law predicts held-out text better than the best n-gram model"
    unknown = "the law of text is unknown, so that what is unseen cannot be told from what is rare"
    primary = [
        loss.contrast("ngram", "C2", statement, at_most=-NEARER_ON_TEXT, label=LABELS["ngram"]),
        untestable("C2", GENERALISES, "gain_unseen", unknown),
    ] if "ngram" in nulls else []  # fmt: skip
    by_position = {name: values.mean(axis=0) for name, values in losses.items()}
    return _Part(
        quantities=[loss, bits_per_byte],
        primary=primary,
        conventions={
            "loss": f"nats per token, mean over {T} positions of windows of the validation split within one document",
            "documents": len(np.unique(drawn.documents)),
            "bytes_per_token": bytes_per_token,
            "excess_loss": "unknown: the law of text is",
        },
        arrays=_arrays_by_position("loss", by_position, *mean_interval(losses["model"])),
        figures=[_position_figure(by_position, "loss", "Loss on held-out text against the number of tokens given")],
    )


def _arrays_by_position(
    what: str, by_position: dict[str, np.ndarray], low: np.ndarray, high: np.ndarray
) -> dict[str, np.ndarray]:
    arrays = {f"{what}_{name}": values for name, values in by_position.items()}
    return arrays | {"position": np.arange(1, len(low) + 1), f"{what}_low": low, f"{what}_high": high}


def _position_figure(by_position: dict[str, np.ndarray], what: str, title: str) -> Figure:
    def series(name: str) -> Series:
        low, high = (f"{what}_low", f"{what}_high") if name == "model" else (None, None)
        return Series(LABELS[name], f"{what}_{name}", "position", low=low, high=high, dashed=name != "model")

    return Figure(
        name=f"{what}_by_position",
        title=title,
        x_label="tokens given",
        y_label="E KL(world ‖ model), nats" if what == "kl" else "loss, nats per token",
        series=tuple(series(name) for name in by_position),
        log_y=what == "kl" and all((values > 0).all() for values in by_position.values()),
    )


# Calibration.


def _calibration(steps: dict[str, Steps], drawn: Draw, exact: bool) -> _Part:
    """Expected calibration error: summed over bins, |probability given - what came of it|, per step."""
    T = steps["model"].kl.shape[1]
    out = _Part(conventions={
        "calibration": "all tokens, and the most probable one (top); probability mass per step, in bins with edges "
        + ", ".join(f"{edge:g}" for edge in EDGES)
        + ("; against the world's exact probabilities" if exact else "; against the tokens that came"),
    })  # fmt: skip
    for key, of in (("calibration_error", "bins"), ("top_calibration_error", "top_bins")):
        bins = {name: getattr(each, of) for name, each in steps.items()}
        gaps = {name: (of[:, :, 1] - of[:, :, 2]) / T for name, of in bins.items()}
        # What a calibrated model would score: with samples for truth, the mean of |normal| in each bin.
        spread = np.sqrt(2 / np.pi * np.maximum(bins["model"].sum(axis=0)[:, 3], 0)).sum() / T / len(drawn.tokens)
        nulls = {name: gap for name, gap in gaps.items() if name != "model"}
        nulls |= {"calibrated": 0.0 if exact else float(spread)}
        documents = None if exact else drawn.documents
        out.quantities.append(
            Quantity(key, gaps["model"], nulls, "probability", statistic=_summed, documents=documents)
        )
    for name, each in steps.items():
        total = each.bins.sum(axis=0)
        total = total[total[:, 0] > 0.5]
        out.arrays[f"calibration_given_{name}"] = total[:, 1] / total[:, 0]
        out.arrays[f"calibration_came_{name}"] = total[:, 2] / total[:, 0]
        out.arrays[f"calibration_count_{name}"] = total[:, 0]
    out.arrays["calibration_diagonal"] = np.array([0.0, 1.0])
    series = [
        Series(LABELS[name], f"calibration_came_{name}", f"calibration_given_{name}", dashed=name != "model")
        for name in steps
    ]
    series.append(Series("calibrated", "calibration_diagonal", "calibration_diagonal", dashed=True))
    out.figures.append(
        Figure(
            name="calibration",
            title="Do tokens come as often as the model says?",
            x_label="probability given",
            y_label="the world's probability" if exact else "share that came",
            series=tuple(series),
            equal_aspect=True,
        )
    )
    return out


def _summed(gaps: np.ndarray) -> Any:
    return np.abs(gaps).sum(axis=-1)


# Walks.


def _visits(subject: Subject, laws: dict[str, Any], drawn: Draw) -> _Part:
    """C1: how often walks of the model visit each token within 1, ..., n steps, after held-out contexts."""
    world, V = subject.world, subject.model.vocab_size
    data = "world" if world is not None else "text"
    walks = WALKS[data]
    given = min(LONGEST_PROMPT, drawn.tokens.shape[1] // 2)
    room = drawn.tokens.shape[1] - given
    n = min(room, STEPS_ON_TEXT if world is None else max(1, int(math.log(CONTINUATIONS) / math.log(max(V, 2)) + 1e-9)))
    share = SHARE_OF_VISITS[data]
    statement = f"given a context, walks of the model visit tokens within 1 to {n} steps as often as the {data} does"
    cannot = functools.partial(untestable, "C1", statement, "visit_error")
    paths = drawn.tokens[:PROMPTS, : given + n]
    before, after = paths[:, :given], paths[:, given:]
    try:
        fit = subject.draw(BASE_PATHS, given + n, to_fit=True).tokens[:, given:]
    except NotApplicable as reason:
        return _Part(primary=[cannot(str(reason).rstrip("."))])
    if world is None:
        truth = np.asarray(jax.vmap(functools.partial(_visited_by, V=V))(jnp.asarray(after)))
    else:
        rows = continuations(V, n)
        truth = measure(world_visits, world, before, shared=(rows,), elements=ELEMENTS // len(rows))
    base = np.stack([_visit_rates(fit[:, : s + 1], V) for s in range(n)])
    base_error = ((base - truth) ** 2).sum(axis=(1, 2)) / n - (base * (1 - base)).sum() / n / (len(fit) - 1)
    each = before, truth.astype(np.float32), np.arange(len(paths), dtype=np.int32)
    seed = np.int32(subject.seed)
    errors = {
        name: measure(walk_error(n, walks), law, *each, shared=(seed,), elements=ELEMENTS // walks)
        for name, law in laws.items()
        if name == "model" or (name == "untrained" and world is not None)
    }
    documents = None if world is not None else drawn.documents[:PROMPTS]
    quantity = Quantity(
        "visit_error",
        errors.pop("model"),
        errors | {"base_rates": base_error},
        "squared probability, summed over tokens",
        documents=documents,
    )
    scaled = dataclasses.replace(quantity, nulls={"share": share * base_error})
    if world is not None and base_error.mean() < VISITS_ROOM:
        contrast = cannot("contexts hardly change which tokens come")
    else:
        label = f"{share:.0%} of the error of base rates"
        contrast = scaled.contrast("share", "C1", statement, at_most=0.0, label=label)
    return _Part(
        quantities=[quantity],
        primary=[contrast],
        conventions={
            "visit_error": f"squared difference between the share of {walks} walks that visit a token by a step and "
            + ("the world's exact probability" if world is not None else "whether the text does")
            + f", without its sampling variance, summed over tokens, mean over {n} steps, after {given} tokens of "
            f"{len(paths)} held-out paths",
        },
    )


def _visited_by(path: Int[Array, " S"], V: int) -> Float[Array, "S V"]:
    """Whether a path has visited each token by each step."""
    return jax.lax.cummax(jax.nn.one_hot(path, V), axis=0)


def _visit_rates(paths: Int[np.ndarray, "n S"], V: int) -> Float[np.ndarray, " V"]:
    """The share of paths that visit each token."""
    visited = np.unique(paths + V * np.arange(len(paths))[:, None]) % V
    return np.bincount(visited, minlength=V) / len(paths)


def world_visits(world: Any, prompt: Int[Array, " P"], rows: Int[Array, "N S"]) -> Float[Array, "S V"]:
    """The probability that the world, after a prompt, visits each token by each step, where `rows` are all paths."""

    def log_prob(row: Array) -> Array:
        return world.path_log_prob(jnp.concatenate([prompt, row]), given=len(prompt))

    visited = jax.vmap(functools.partial(_visited_by, V=world.vocab_size))(rows)
    return jnp.einsum("n,nsv->sv", jnp.exp(jax.vmap(log_prob)(rows)), visited)


@functools.cache
def walk_error(steps: int, walks: int) -> Any:
    """The measure of how far the visits of sampled walks are from the truth."""

    def walk_error(
        model: Transformer, prompt: Int[Array, " P"], truth: Float[Array, "S V"], index: Int[Array, ""], seed: Any
    ) -> Float[Array, ""]:
        """The mean over steps of the squared error of the share of walks that have visited a token, summed over tokens.

        The variance of sampling is subtracted.
        """
        tokens = sample_paths(model, prompt, jax.random.fold_in(jax.random.key(seed), index), steps, walks).tokens
        share = jax.vmap(functools.partial(_visited_by, V=model.vocab_size))(tokens).mean(axis=0)
        return jnp.sum((share - truth) ** 2 - share * (1 - share) / (walks - 1)) / steps

    return walk_error


def _sampler(subject: Subject, paths: np.ndarray, samples: int) -> _Part:
    """The model's samples, by the recurrent form, against its enumerated law, by the parallel form."""
    V, T = subject.model.vocab_size, paths.shape[1] - 1
    steps = max(1, min(T - 1, int(math.log(samples / 8) / math.log(max(V, 2)))))
    first = np.array([np.argmax(np.bincount(paths[:, 0], minlength=V))])
    seed = np.array([subject.seed], np.int32)
    tokens, law = measure(walks_and_law(steps, samples), subject.model, first[None].astype(np.int32), seed)
    counts = np.bincount(tokens[0].astype(np.int64) @ V ** np.arange(steps)[::-1], minlength=V**steps)
    law = np.exp(law[0])
    out = _Part(arrays={"sampled_counts": counts, "enumerated_law": law})
    try:
        G, p = g_test(counts, law)
    except NotApplicable as error:
        out.conventions["g_test"] = f"none: {error}"
        return out
    out.checks = [
        Check(
            "sampler",
            1 - p,
            0.999,
            f"{samples} sampled continuations by {steps} of token {int(first[0])} come as often as their law "
            f"says: G = {G:.1f}, and 1 - p, by simulation, is uniform in 0..1 (above 0.999 in one run of 1000)",
        )
    ]
    return out


@functools.cache
def walks_and_law(steps: int, samples: int) -> Any:
    """The measure of sampled continuations and of the enumerated law."""

    def walks_and_law(
        model: Transformer, prompt: Int[Array, " P"], seed: Int[Array, ""]
    ) -> tuple[Int[Array, "n steps"], Float[Array, " N"]]:
        """n sampled continuations of a prompt, and the log-probability of each of the N that there are."""
        tokens = sample_paths(model, prompt, jax.random.key(seed), steps, samples).tokens
        if steps == 1:
            return tokens, next_log_probs(model, prompt)[-1]
        return tokens, enumerated_log_probs(model, prompt, steps)[1]

    return walks_and_law
