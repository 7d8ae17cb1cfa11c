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
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import (
    EDGES,
    NGram,
    Steps,
    best_ngram,
    check_data,
    held_out_paths,
    observe,
)
from jaxwalk.evidence.statistics import bootstrap, g_test, mean_interval
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.paths import continuations, enumerated_log_probs, next_log_probs, sample_paths

CLAIM = (
    "C1, C2: behaviours are paths that the model random-walks, and training learns a distribution over all paths, "
    "not only over those it was trained on."
)
LABELS = {"model": "model", "untrained": "untrained model", "ngram": "best n-gram model"}


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
        ngram, chosen = best_ngram(subject, held_out.shape[1])
        laws["ngram"] = ngram
        conventions["ngram"] = chosen
    sampled = {name: observe(law, world, held_out, binned=True) for name, law in laws.items()}

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
        "kl_total": "over the enumerated paths, in nats per path"
        if m > 1
        else "not measured: only the first token is enumerated, which is given to both",
    })  # fmt: skip
    allowed = world_mass > 0
    by_position = {}
    for name in laws:
        log_model = first + exact[name].log_prob[:, : m - 1].sum(axis=1)
        by_position[name] = np.concatenate([world_mass @ exact[name].kl[:, :m], sampled[name].kl[:, m:].mean(axis=0)])
        numbers = {"excess_loss": by_position[name].mean()}
        numbers |= {} if m == 1 else {
            "kl_total": world_mass[allowed] @ (log_world[allowed] - log_model[allowed]),
            "mass_off_support": np.exp(log_model[~allowed]).sum(),
            "total_mass": np.exp(log_model).sum(),
        }  # fmt: skip
        for key, value in numbers.items():
            if name == "model":
                out.measured[key] = float(value)
            elif key != "total_mass":
                out.null[name if key == "excess_loss" else f"{key}.{name}"] = float(value)
    out.null["uniform"] = float(np.log(V) - np.concatenate([
        world_mass @ exact["model"].world_entropy[:, :m], sampled["model"].world_entropy[:, m:].mean(axis=0)
    ]).mean())  # fmt: skip
    if m > 1:
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
    if m > 1 and (~allowed).any():  # the first token is given
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
    first = np.array([np.argmax(np.bincount(held_out[:, 0], minlength=V))])
    key = jax.random.key(subject.seed)
    tokens, law = _sampled_and_enumerated(subject.model, first, key, steps, samples)
    counts = np.bincount(np.asarray(tokens, np.int64) @ V ** np.arange(steps)[::-1], minlength=V**steps)
    law = np.exp(np.asarray(law, np.float64))
    out = _Parts(arrays={"sampled_counts": counts, "enumerated_law": law})
    try:  # impossible where the law leaves no choice
        G, cells, p = g_test(counts, law)
    except NotApplicable as error:
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
