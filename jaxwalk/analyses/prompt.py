"""C1 and C3 at one place: the paths that lead on from a prompt, and which of its tokens they hang on.

The law of the next token; the most probable paths, with the certificate of the search; sampled paths; the entropy
of the law of paths; how far the context vector at each position moves with each token vector. Beside them the
exact numbers of the world, where there is one, those of the untrained model, and those of the uniform law.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

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
SENSITIVITY_BUDGET = 4e11
"""Floating-point operations up to which the whole matrix of sensitivities is computed, not its last row only."""


def analyse(
    subject: Subject, *, steps: int = 6, k: int = 10, samples: int = 8, shown: int = 20, budget: int | None = None
) -> Finding:
    """What follows the subject's prompt, and how the context vectors depend on it.

    steps: length of the paths that follow it, less where the model cannot walk so far. k: how many of the most
    probable paths, and `budget` how many prefixes are expanded in their search, at most. samples, shown: how many
    sampled paths, and how many of the most probable next tokens, are shown.
    """
    model, world = subject.model, subject.world
    if subject.prompt is None:
        raise NotApplicable("no prompt was given: pass one with --prompt")
    try:
        prompt = np.asarray(check_tokens(model, np.asarray(subject.prompt)))
    except ValueError as wrong:
        raise NotApplicable(f"the prompt is no path of this model: {wrong}") from wrong
    if world is not None and world.vocab_size != model.vocab_size:
        world = None
    V, P = model.vocab_size, len(prompt)
    steps = min(steps, model.max_length + 1 - P)
    key = jax.random.key(subject.seed)

    laws = {"model": _law(model, prompt, key, steps)}
    if subject.untrained is not None:
        laws["untrained"] = _law(subject.untrained, prompt, key, steps)
    best, sampled = _paths(model, prompt, key, steps, k, samples, budget)
    notes = {}
    if world is not None:
        exact = _world_law(world, prompt, steps)
        if np.isfinite(exact[0]).any():
            laws["world"] = exact
        else:
            notes["world"] = "the world forbids this prompt: it has no law after it"

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    after = {name: np.asarray(law, np.float64) for name, (law, _, _) in laws.items()}
    for name, (_, scored, entropy) in laws.items():
        next_entropy = -np.sum(np.exp(after[name]) * np.where(np.isneginf(after[name]), 0, after[name]))
        numbers = {"path_entropy": entropy.value, "next_entropy": next_entropy}
        if P > 1:
            numbers["prompt_log_prob"] = scored
        for what, value in numbers.items():
            if np.isnan(value):
                continue
            if name == "model":
                measured[what] = float(value)
            else:
                null[name if what == "path_entropy" else f"{what}.{name}"] = float(value)
    error = 1.96 * float(laws["model"][2].standard_error)
    if error:
        interval["path_entropy"] = (measured["path_entropy"] - error, measured["path_entropy"] + error)
    null |= {"uniform": steps * math.log(V), "next_entropy.uniform": math.log(V)}
    if P > 1:
        null["prompt_log_prob.uniform"] = -(P - 1) * math.log(V)
    if "world" in after:
        likely = ~np.isneginf(after["world"])
        for name in after.keys() - {"world"}:
            kl = np.sum(np.exp(after["world"][likely]) * (after["world"] - after[name])[likely])
            if name == "model":
                measured["next_kl"] = float(kl)
            else:
                null[f"next_kl.{name}"] = float(kl)
        null["next_kl.exact"] = 0.0
    returned = np.asarray(best.log_probs, np.float64)
    top = np.asarray(best.tokens)[np.isfinite(returned)]  # there may be fewer paths than k, or none within the budget
    returned = returned[np.isfinite(returned)]
    certified = int(np.sum(returned >= float(best.bound)))
    if len(top):
        measured["top_paths_mass"] = float(np.exp(returned).sum())
        null["top_paths_mass.uniform"] = len(top) / float(V) ** steps

    tree = prefix_tree(best)
    sensitivity, whole = _sensitivity(model, prompt)
    order = np.argsort(-after["model"], kind="stable")[:shown]
    arrays: dict[str, np.ndarray] = {
        "prompt": prompt,
        "prompt_symbols": _labels(subject, prompt, np.arange(P)),
        "next_tokens": order,
        "next_symbols": _labels(subject, order),
        **{f"next_{name}": np.exp(law[order]) for name, law in after.items()},
        "top_tokens": top,
        "top_text": np.array([_text(subject, row) for row in top], str),
        "top_log_probs": returned,
        "tree_parent": tree.parent,
        "tree_token": tree.token,
        "tree_text": np.array(["", *(subject.symbol(token) for token in tree.token[1:].tolist())]),
        "tree_mass": tree.mass,
        "sampled_tokens": np.asarray(sampled.tokens),
        "sampled_text": np.array([_text(subject, row) for row in np.asarray(sampled.tokens)]),
        "sampled_log_probs": np.asarray(sampled.log_probs, np.float64),
        "sensitivity": sensitivity,
        "sensitivity_rows": _labels(subject, prompt, np.arange(P))[-len(sensitivity) :],
    }
    labels = {"model": "model", "world": "world, exact", "untrained": "untrained model"}
    figures = (
        Figure(
            name="next_law",
            title="The law of the token after the prompt",
            x_label="token",
            y_label="probability",
            series=tuple(
                Series(labels[name], f"next_{name}", "next_symbols", style="bars", dashed=name != "model")
                for name in after
            ),
            references={"uniform": 1 / V},
        ),
        Figure(
            name="prompt_sensitivity",
            title="How far each context vector moves with each token vector of the prompt",
            x_label="token that is moved",
            y_label="context vector that moves",
            series=(
                Series(
                    "|d context / d token vector|",
                    "sensitivity",
                    "prompt_symbols",
                    style="heatmap",
                    rows="sensitivity_rows",
                ),
            ),
        ),
    )
    conventions: dict[str, Any] = {
        "units": "nats; top_paths_mass is a probability; sensitivities are ratios of lengths",
        "nulls": "the plain names are nulls of `path_entropy`, the others of the number before the dot",
        "prompt_tokens": P,
        "steps": steps,
        "path_entropy": f"of the law of the next {steps} tokens, "
        + ("a Monte Carlo estimate; interval: 1.96 standard errors" if error else "exact by enumeration"),
        "prompt_log_prob": "log P(prompt | its first token)",
        "next_kl": "KL(world || model) of the next token",
        "top_paths": f"{certified} of {len(top)} are certified to be the most probable (at or above bound "
        f"{float(best.bound):.4g}); the mass of other paths is {float(best.unexplored_mass):.4g}"
        if len(top)
        else "none: the law is so flat that the search found no whole path before its budget was spent",
        "tree": "arrays tree_*: the prefixes of the most probable paths, each with the mass of those that begin so",
        "sampled_paths": f"{samples} exact samples of the model's law, no temperature",
        "sensitivity": "Frobenius norm of d context / d token vector, row: context, column: token; local, and no share "
        "of anything" + ("" if whole else "; last context vector only, as the prompt is long"),
        **notes,
    }
    verdict = (
        f"After this prompt the next {steps} tokens are worth {math.exp(measured['path_entropy']):.3g} effective paths "
        f"({measured['path_entropy']:.3f} nats"
        + "".join(f", {labels[name]} {null[name]:.3f}" for name in ("world", "untrained") if name in null)
        + (
            f"); the {len(top)} most probable found hold {measured['top_paths_mass']:.1%} of the probability, "
            f"{certified} of them certified."
            if len(top)
            else "); the law is too flat for the search to find the most probable."
        )
    )
    return Finding("prompt", CLAIM, measured, interval, null, conventions, arrays, figures, verdict)


@functools.partial(jax.jit, static_argnames="steps")
def _law(
    model: Transformer, prompt: Int[Array, " P"], key: Array, steps: int
) -> tuple[Float[Array, " V"], Float[Array, ""], Estimate]:
    """The next-step law, the prompt's log-probability, and the entropy of the law of paths."""
    entropy = path_entropy(model, prompt, steps, key=key, samples=256)
    return next_log_probs(model, prompt)[-1], path_log_prob(model, prompt), entropy


@functools.partial(jax.jit, static_argnames=("steps", "k", "samples", "budget"))
def _paths(
    model: Transformer, prompt: Int[Array, " P"], key: Array, steps: int, k: int, samples: int, budget: int | None
) -> tuple[Paths, Paths]:
    return top_paths(model, prompt, steps, k, budget=budget), sample_paths(model, prompt, key, steps, samples)


@functools.partial(jax.jit, static_argnames="steps")
def _world_law(
    world: Any, prompt: Int[Array, " P"], steps: int
) -> tuple[Float[Array, " V"], Float[Array, ""], Estimate]:
    """The world's exact numbers; NaN where it forbids the prompt. The entropy is NaN where paths are too many."""
    law = world.next_log_probs(prompt)[-1]
    entropy = jnp.array(jnp.nan)
    if world.vocab_size**steps <= ENUMERABLE:
        after = continuations(world.vocab_size, steps)
        rows = jnp.concatenate([jnp.broadcast_to(prompt, (len(after), len(prompt))), after], axis=1)
        log_probs = jax.vmap(functools.partial(world.path_log_prob, given=len(prompt)))(rows)
        entropy = jnp.maximum(jax.scipy.special.entr(jnp.exp(log_probs)).sum(), 0)
    return law, world.path_log_prob(prompt, given=1), Estimate(entropy, jnp.zeros(()), jnp.array(jnp.inf))


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
