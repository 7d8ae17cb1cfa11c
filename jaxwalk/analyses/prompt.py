"""C1 and C3 at one place: the paths that lead on from a prompt, and which of its tokens they hang on.

The law of the next token; the most probable paths, with the certificate of the search; sampled paths; the entropy
of the law of paths; how far the context vector at each position moves with each token vector. Beside them the
exact numbers of the world, where there is one, those of the untrained model, and those of the uniform law.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.decision import Quantity, numbers
from jaxwalk.evidence.engine import PRECISION
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.model.inputs import check_tokens
from jaxwalk.paths import (
    ENUMERABLE,
    Estimate,
    Paths,
    continuations,
    next_log_probs,
    path_entropy,
    path_log_prob,
    prefix_tree,
    sample_paths,
    top_paths,
)
from jaxwalk.probes import context_sensitivity, context_vjp

CLAIM = "C1, C3: behaviours are paths that the model random-walks; a prompt says where the walk stands, and narrows it."
LABELS = {"model": "model", "world": "world, exact", "untrained": "untrained model"}
CONVENTIONS = {
    "units": "nats; top_paths_mass is a probability; sensitivities are ratios of lengths",
    "prompt_log_prob": "log P(prompt | its first token)",
    "next_kl": "KL(world || model) of the next token",
    "tree": "arrays tree_*: the prefixes of the most probable paths, each with the mass of those that begin so",
}
SENSITIVITY = (
    "Frobenius norm of d context / d token vector, row: context, column: token; local, and no share of anything"
)
SENSITIVITY_BUDGET = 4e11
"""Floating-point operations up to which the whole matrix of sensitivities is computed, not its last row only."""


def analyse(
    subject: Subject, *, steps: int = 6, k: int = 10, samples: int = 8, shown: int = 20, budget: int | None = None
) -> Finding:
    """What follows the subject's prompt, and how the context vectors depend on it. It describes, and decides nothing.

    Args:
        subject: the model and its prompt.
        steps: the length of the paths that follow it, less where the model cannot walk so far.
        k: how many of the most probable paths.
        samples: how many sampled paths.
        shown: how many of the most probable next tokens.
        budget: how many prefixes are expanded at most in the search for the most probable paths.
    """
    model, prompt = subject.model, _prompt(subject)
    steps = min(steps, model.max_length + 1 - len(prompt))
    key = jax.random.key(subject.seed)
    with jax.default_matmul_precision(PRECISION):
        laws, notes = _laws(subject, prompt, key, steps)
        best, sampled = _paths(model, prompt, key, steps, k, samples, budget)
        sensitivity, whole = _sensitivity(model, prompt)
    log_probs = np.asarray(best.log_probs, np.float64)
    log_probs = log_probs[np.isfinite(log_probs)]  # there may be fewer paths than k, or none within the budget
    certified = int(np.sum(log_probs >= float(best.bound)))
    found = numbers(_quantities(laws, log_probs, steps, len(prompt)))
    error = 1.96 * float(laws["model"].entropy.standard_error)
    if error:
        value = found["measured"]["path_entropy"]
        found["interval"]["path_entropy"] = (value - error, value + error)
    order = np.argsort(-laws["model"].next, kind="stable")[:shown]
    places = _labels(subject, prompt, np.arange(len(prompt)))
    arrays = {
        "prompt": prompt,
        "prompt_symbols": places,
        "next_tokens": order,
        "next_symbols": _labels(subject, order),
        **{f"next_{name}": np.exp(law.next[order]) for name, law in laws.items()},
        "sensitivity": sensitivity,
        "sensitivity_rows": places[-len(sensitivity) :],
        **_path_arrays(subject, best, sampled),
    }
    conventions: dict[str, Any] = {
        **CONVENTIONS,
        "prompt_tokens": len(prompt),
        "steps": steps,
        "path_entropy": f"of the law of the next {steps} tokens, "
        + ("a Monte Carlo estimate; interval: 1.96 standard errors" if error else "exact by enumeration"),
        "top_paths": f"{certified} of {len(log_probs)} are certified to be the most probable (at or above bound "
        f"{float(best.bound):.4g}); the mass of other paths is {float(best.unexplored_mass):.4g}"
        if len(log_probs)
        else "none: the law is so flat that the search found no whole path before its budget was spent",
        "sampled_paths": f"{samples} exact samples of the model's law, no temperature",
        "sensitivity": SENSITIVITY + ("" if whole else "; last context vector only, as the prompt is long"),
        **notes,
    }
    return Finding(
        "prompt",
        CLAIM,
        **found,
        conventions=conventions,
        arrays=arrays,
        figures=_figures(laws, model.vocab_size),
        verdict=_sentence(found["measured"], found["null"], steps, len(log_probs), certified),
    )


def _path_arrays(subject: Subject, best: Paths, sampled: Paths) -> dict[str, np.ndarray]:
    """The most probable paths, the tree of their prefixes, and the sampled paths."""
    likely, tree = np.isfinite(best.log_probs), prefix_tree(best)
    top = np.asarray(best.tokens)[likely]
    return {
        "top_tokens": top,
        "top_text": np.array([_text(subject, row) for row in top], str),
        "top_log_probs": np.asarray(best.log_probs, np.float64)[likely],
        "tree_parent": tree.parent,
        "tree_token": tree.token,
        "tree_text": np.array(["", *(subject.symbol(token) for token in tree.token[1:].tolist())]),
        "tree_mass": tree.mass,
        "sampled_tokens": np.asarray(sampled.tokens),
        "sampled_text": np.array([_text(subject, row) for row in np.asarray(sampled.tokens)]),
        "sampled_log_probs": np.asarray(sampled.log_probs, np.float64),
    }


def _prompt(subject: Subject) -> Int[np.ndarray, " P"]:
    """The prompt. Raises NotApplicable if there is none, or the model cannot walk it."""
    if subject.prompt is None:
        raise NotApplicable("no prompt was given: pass one with --prompt")
    try:
        return np.asarray(check_tokens(subject.model, np.asarray(subject.prompt)))
    except ValueError as wrong:
        raise NotApplicable(f"the prompt is no path of this model: {wrong}") from wrong


class Law(NamedTuple):
    """What one law says about a prompt.

    Attributes:
        next: [V], the log-probabilities of the next token.
        prompt: the log-probability of the prompt, given its first token.
        entropy: of the law of the paths that follow.
    """

    next: Any
    prompt: Any
    entropy: Estimate


def _laws(
    subject: Subject, prompt: Int[np.ndarray, " P"], key: Array, steps: int
) -> tuple[dict[str, Law], dict[str, str]]:
    """The laws of the model, the untrained model and the world, and a note if the world has none."""
    model, world = subject.model, subject.world
    laws = {"model": _law(model, prompt, key, steps)}
    if subject.untrained is not None:
        laws["untrained"] = _law(subject.untrained, prompt, key, steps)
    notes = {}
    if world is not None and world.vocab_size == model.vocab_size:
        laws["world"] = _world_law(world, prompt, steps)
        if not np.isfinite(laws["world"].next).any():
            notes["world"] = "the world forbids this prompt: it has no law after it"
            del laws["world"]
    return {name: law._replace(next=np.asarray(law.next, np.float64)) for name, law in laws.items()}, notes


def _quantities(laws: Mapping[str, Law], top_log_probs: Float[np.ndarray, " k"], steps: int, P: int) -> list[Quantity]:
    """The numbers of each law, those of the uniform law and, where there is a world, the divergence from it."""
    V = len(laws["model"].next)
    entropy = {
        name: -np.sum(np.where(np.isneginf(law.next), 0, np.exp(law.next) * law.next)) for name, law in laws.items()
    }
    columns = {
        "path_entropy": {name: float(law.entropy.value) for name, law in laws.items()}
        | {"uniform": steps * math.log(V)},
        "next_entropy": {name: float(h) for name, h in entropy.items()} | {"uniform": math.log(V)},
    }
    if P > 1:
        scores = {name: float(law.prompt) for name, law in laws.items()}
        columns["prompt_log_prob"] = scores | {"uniform": -(P - 1) * math.log(V)}
    if "world" in laws:
        truth = laws["world"].next
        likely = ~np.isneginf(truth)
        columns["next_kl"] = {
            name: float(np.sum(np.exp(truth[likely]) * (truth - law.next)[likely]))
            for name, law in laws.items()
            if name != "world"
        } | {"exact": 0.0}
    if len(top_log_probs):
        columns["top_paths_mass"] = {
            "model": float(np.exp(top_log_probs).sum()),
            "uniform": len(top_log_probs) / float(V) ** steps,
        }
    known = {what: {n: v for n, v in values.items() if not math.isnan(v)} for what, values in columns.items()}
    return [Quantity(what, values.pop("model"), values) for what, values in known.items() if "model" in values]


def _figures(laws: Mapping[str, Law], V: int) -> tuple[Figure, ...]:
    bars = tuple(
        Series(LABELS[name], f"next_{name}", "next_symbols", style="bars", dashed=name != "model") for name in laws
    )
    title = "How far each context vector moves with each token vector of the prompt"
    cells = Series(
        "|d context / d token vector|", "sensitivity", "prompt_symbols", style="heatmap", rows="sensitivity_rows"
    )
    return (
        Figure(
            "next_law",
            "The law of the token after the prompt",
            "token",
            "probability",
            bars,
            references={"uniform": 1 / V},
        ),
        Figure("prompt_sensitivity", title, "token that is moved", "context vector that moves", (cells,)),
    )


def _sentence(measured: Mapping[str, float], null: Mapping[str, float], steps: int, top: int, certified: int) -> str:
    entropy = measured["path_entropy"]
    others = "".join(f", {LABELS[name]} {null[name]:.3f}" for name in ("world", "untrained") if name in null)
    return (
        f"After this prompt the next {steps} tokens are worth {math.exp(entropy):.3g} effective paths "
        f"({entropy:.3f} nats{others}); "
        + (
            f"the {top} most probable found hold {measured['top_paths_mass']:.1%} of the probability, {certified} of "
            "them certified."
            if top
            else "the law is too flat for the search to find the most probable."
        )
    )


@functools.partial(jax.jit, static_argnames="steps")
def _law(model: Transformer, prompt: Int[Array, " P"], key: Array, steps: int) -> Law:
    """The numbers of a model."""
    entropy = path_entropy(model, prompt, steps, key=key, samples=256)
    return Law(next_log_probs(model, prompt)[-1], path_log_prob(model, prompt), entropy)


@functools.partial(jax.jit, static_argnames=("steps", "k", "samples", "budget"))
def _paths(
    model: Transformer, prompt: Int[Array, " P"], key: Array, steps: int, k: int, samples: int, budget: int | None
) -> tuple[Paths, Paths]:
    return top_paths(model, prompt, steps, k, budget=budget), sample_paths(model, prompt, key, steps, samples)


@functools.partial(jax.jit, static_argnames="steps")
def _world_law(world: Any, prompt: Int[Array, " P"], steps: int) -> Law:
    """The world's exact numbers; NaN where it forbids the prompt. The entropy is NaN where paths are too many."""
    law = world.next_log_probs(prompt)[-1]
    entropy = jnp.array(jnp.nan)
    if world.vocab_size**steps <= ENUMERABLE:
        after = continuations(world.vocab_size, steps)
        rows = jnp.concatenate([jnp.broadcast_to(prompt, (len(after), len(prompt))), after], axis=1)
        log_probs = jax.vmap(functools.partial(world.path_log_prob, given=len(prompt)))(rows)
        entropy = jnp.maximum(jax.scipy.special.entr(jnp.exp(log_probs)).sum(), 0)
    return Law(law, world.path_log_prob(prompt, given=1), Estimate(entropy, jnp.zeros(()), jnp.array(jnp.inf)))


@functools.partial(jax.jit, static_argnames="whole")
def _sensitivities(model: Transformer, prompt: Int[Array, " P"], whole: bool) -> Float[Array, "R P"]:
    if whole:
        return context_sensitivity(model, prompt)
    last = jnp.zeros((len(prompt), model.width), model.embed.table.dtype)

    def row(direction: Array) -> Array:
        return jnp.sum(context_vjp(model, prompt, last.at[-1].set(direction)) ** 2, axis=-1)

    squares = lax.map(row, jnp.eye(model.width, dtype=last.dtype), batch_size=min(16, model.width))
    return jnp.sqrt(squares.sum(axis=0))[None]


def _sensitivity(model: Transformer, prompt: Int[np.ndarray, " P"]) -> tuple[Float[np.ndarray, "R P"], bool]:
    """Sensitivities of all context vectors to all token vectors, or of the last one where that is too much work."""
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    whole = 4.0 * weights * len(prompt) ** 2 * model.width <= SENSITIVITY_BUDGET
    return np.asarray(_sensitivities(model, prompt, whole), np.float64), whole


def _labels(subject: Subject, tokens: Int[np.ndarray, " n"], places: Int[np.ndarray, " n"] | None = None) -> np.ndarray:
    """How tokens are named on an axis, each name once: with their places, or their ids where symbols repeat."""
    symbols = [subject.symbol(token) for token in tokens.tolist()]
    if places is not None:
        return np.array([f"{place}: {symbol}" for place, symbol in zip(places, symbols, strict=True)])
    return np.array([s if symbols.count(s) == 1 else f"{s} ({t})" for s, t in zip(symbols, tokens, strict=True)])


def _text(subject: Subject, tokens: Int[np.ndarray, " n"]) -> str:
    """A path as text."""
    return " ".join(map(str, tokens)) if subject.vocabulary is None else subject.vocabulary.decode(tokens)
