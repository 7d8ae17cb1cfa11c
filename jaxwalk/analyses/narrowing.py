"""C3: there is no learning in context; a context only narrows the set of paths that are left.

Three measures. The chain rule, P(continuation | context) = P(context continuation) / P(context), with the left side
from the recurrent form and the right side from the parallel one. The entropy of the law of the next few tokens, and
its exp, the effective number of paths, against the length of the context. The loss by position, against the
observer who knows the world.

Reference: the entropies of the world's own posterior predictive after the same contexts, and its ideal loss. Nulls:
contexts whose tokens are shuffled; the untrained model. Narrowing holds on average and not in every case: in how
many it does is reported.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.finding import Figure, Finding, Series
from jaxwalk.evidence.laws import batch_size, check_data, held_out_paths, in_batches, observe
from jaxwalk.evidence.statistics import bootstrap, mean_interval
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import State, Transformer, init_state, step
from jaxwalk.paths import continuations
from jaxwalk.worlds import HiddenMarkov

CLAIM = "C3: there is no learning in context: a context only narrows the set of paths that are left."
LABELS = {
    "model": "model",
    "world": "world, exact",
    "ideal": "observer who knows the world",
    "shuffled": "model, shuffled context",
    "untrained": "untrained model",
}

LAWS = 1 << 25
"""How many probabilities the laws along the held-out paths have in all, unless their number is asked for."""


def analyse(
    subject: Subject,
    *,
    paths: int | None = None,
    contexts: int | None = None,
    steps: int | None = None,
    enumerated: int = 16,
    light: bool = False,
) -> Finding:
    """How the law of what comes next changes with its context.

    paths: held-out paths for the loss by position (by default 512 of a world, 128 of text, fewer of a large
    vocabulary). contexts: how many of them are contexts of path entropies (by default 64, 32, or a quarter of them).
    steps: n of the n-step path entropy; by default as many as leave at most `enumerated` continuations to walk, or,
    where these are none, 8 by sampling. light: fewer paths, for `training_walk`.
    """
    check_data(subject)
    model, untrained, world, V = subject.model, subject.untrained, subject.world, subject.model.vocab_size
    default_paths, default_contexts = (64, 16) if light else (128, 32) if world is None else (512, 64)
    rows = held_out_paths(subject, paths or default_paths)
    held = max(8, LAWS // (V * rows.shape[1]))
    rows = rows if paths else rows[:held]
    some = rows[: contexts or min(default_contexts, max(8, held // 4))]
    T = rows.shape[1] - 1
    if steps is None:
        longest = 1 + int(math.log(enumerated) / math.log(max(V, 2)) + 1e-9)
        steps = min(longest if longest > 1 else 8, max(1, T // 4))
    exact = V ** (steps - 1) <= enumerated
    # In models of text a single token is often an attention sink, and no context like others.
    lengths = _lengths(1 if world is not None else 2, T - steps + 1)
    late = max(1, T // 4)

    given = dict.fromkeys(lengths, some)
    shuffled = {length: _shuffle(some, length, subject.seed) for length in lengths}
    entropies = _enumerated_entropies if exact else functools.partial(_sampled_entropies, seed=subject.seed)
    entropy = entropies(model, world, given, steps)
    entropy["shuffled"] = entropies(model, world, shuffled, steps)["model"]
    laws = {"model": model}
    if untrained is not None:
        laws["untrained"] = untrained
        entropy["untrained"] = entropies(untrained, world, given, steps)["model"]
    observed = {name: observe(law, world, rows) for name, law in laws.items()}
    next_entropy: dict[str, np.ndarray] = {}
    shuffle_cost: dict[str, np.ndarray] = {}
    for name in observed:
        true, lost = observed[name], observe(laws[name], world, np.concatenate(list(shuffled.values())))
        next_entropy[name] = _at([true.entropy[: len(some)]] * len(lengths), lengths)
        if name == "model":
            next_entropy["shuffled"] = _at(np.split(lost.entropy, len(lengths)), lengths)
        shuffle_cost[name] = _shuffle_cost(
            true.log_prob[: len(some)], np.split(lost.log_prob, len(lengths)), lengths, steps
        )
    kl = {name: s.kl for name, s in observed.items()}
    ideal, ideal_is = (np.zeros(T), "") if world is None else _ideal_loss(world, observed["model"].world_entropy)
    chain_rule_error, chain_rule_nulls = _chain_rule(
        model, world, some[:16], sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    )

    numbers = _Numbers("narrowing")
    numbers.add("narrowing", lambda h: (h[:, 0] - h[:, -1]).mean(), entropy)
    numbers.add("path_entropy", lambda h: h[:, -1].mean(), entropy, uniform=steps * math.log(V))
    numbers.add("effective_paths", lambda h: math.exp(h[:, -1].mean()), entropy, uniform=float(V) ** steps)
    # Of one context at a time, so it needs exact entropies.
    doubled = [i for i in range(len(lengths) - 1) if lengths[i + 1] == 2 * lengths[i]]
    if doubled:
        each = entropy if exact else next_entropy
        fell = {name: h[:, [i + 1 for i in doubled]] < h[:, doubled] for name, h in each.items()}
        numbers.add("doublings_that_narrow", np.mean, fell, coin=0.5)
    if "world" in entropy:
        off = {name: np.abs(entropy[name] - entropy["world"]) for name in observed}
        numbers.add("entropy_error", np.mean, off, exact=0.0)
    if world is not None:
        numbers.add("excess_at_end", lambda x: x[:, -1].mean(), kl, ideal=0.0)
    if lengths[-1] > 1:
        numbers.add("shuffle_cost", np.mean, shuffle_cost, order_blind=0.0)
    loss = {name: s.kl if world is None else s.kl + s.world_entropy for name, s in observed.items()}
    reference = {} if world is None else {"ideal": float(ideal[0] - ideal[-late:].mean())}
    numbers.add("loss_gain", lambda x: (x[:, 0] - x[:, -late:].mean(axis=1)).mean(), loss, **reference)
    numbers.measured["chain_rule_error"] = chain_rule_error
    numbers.null |= {f"chain_rule_error.{name}": value for name, value in chain_rule_nulls.items()}

    arrays: dict[str, np.ndarray] = {"context_length": np.array(lengths), "position": np.arange(1, T + 1)}
    arrays["entropy_per_path"] = entropy["model"]
    for name, h in entropy.items():
        arrays[f"entropy_{name}"], arrays[f"effective_paths_{name}"] = h.mean(axis=0), np.exp(h.mean(axis=0))
    arrays["entropy_model_low"], arrays["entropy_model_high"] = mean_interval(entropy["model"])
    for name in observed:
        arrays[f"loss_{name}"] = ideal + kl[name].mean(axis=0)
    # What varies on a world is the excess: the ideal loss is the same for every sample of paths.
    arrays["loss_model_low"], arrays["loss_model_high"] = (ideal + end for end in mean_interval(kl["model"]))
    if world is not None:
        arrays["loss_ideal"] = ideal

    def lines(what: str, x: str, names: list[str]) -> tuple[Series, ...]:
        return tuple(
            Series(
                LABELS[name],
                f"{what}_{name}",
                x,
                low=f"{what}_model_low" if name == "model" else None,
                high=f"{what}_model_high" if name == "model" else None,
                dashed=name != "model",
            )
            for name in names
        )

    figures = (
        Figure(
            name="path_entropy",
            title=f"What is left open about the next {steps} tokens, by length of the context",
            x_label="tokens of context",
            y_label="path entropy, nats",
            series=lines("entropy", "context_length", [name for name in entropy if name != "untrained"]),
            log_x=True,
        ),
        Figure(
            name="loss_by_position",
            title="Loss by position" + ("" if world is None else ", beside the observer who knows the world"),
            x_label="tokens of context",
            y_label="loss, nats per token",
            series=lines("loss", "position", list(observed) if world is None else ["model", "ideal"]),
        ),
    )
    conventions = {
        "units": "nats",
        "nulls": f"the plain names are nulls of `{numbers.headline}`, the others of the number before the dot",
        "paths": len(rows),
        "tokens_per_path": T + 1,
        "contexts": len(some),
        "context_lengths": list(lengths),
        "steps": steps,
        "narrowing": f"fall of the mean {steps}-step path entropy from the shortest context to the longest, by "
        + ("enumeration" if exact else "one sampled continuation of each context: the sum of its steps' entropies"),
        "path_entropy": "at the longest context; effective_paths is exp of the mean entropy",
        "doublings_that_narrow": "share of contexts with less entropy than their first half, over paths and "
        "lengths: " + (f"of the next {steps} tokens" if exact else "of the next token, which is exact"),
        "entropy_error": "mean over contexts of |path entropy - the world's after the same context|",
        "excess_at_end": "E KL(world || model) of the step at the last position",
        "shuffled": "all tokens of the context are permuted; what comes after it is the true continuation",
        "shuffle_cost": f"loss of the next {steps} tokens after a shuffled context less that after the true one, nats "
        "per token, mean over lengths of 2 or more",
        "loss": "of the tokens that came" if world is None else f"in expectation over the next token; {ideal_is}",
        "loss_gain": f"loss at the first position less the mean of the last {late}",
        "chain_rule_error": "largest error of log P(continuation | context), recurrent against parallel, over "
        f"{len(some[:16])} paths cut at the first, middle and last length; rounding: of the largest log-probability, "
        "once; other_context: mean change where the context is another path's",
        "intervals": "95%, bootstrap over paths",
    }
    optional = {"doublings_that_narrow", "entropy_error", "excess_at_end", "shuffle_cost"}
    conventions = {k: v for k, v in conventions.items() if k not in optional or k in numbers.measured}
    beside = {"world": "the world's own", "shuffled": "after shuffled contexts", "untrained": "the untrained model's"}
    verdict = (
        f"From {lengths[0]} to {lengths[-1]} tokens of context the entropy of the next {steps} tokens changes by "
        f"{-numbers.measured['narrowing']:+.3f} nats ("
        + ", ".join(f"{text} {-numbers.null[name]:+.3f}" for name, text in beside.items() if name in numbers.null)
        + f"); the chain rule holds to {chain_rule_error:.0e} nats."
    )
    return Finding(
        "narrowing", CLAIM, numbers.measured, numbers.interval, numbers.null, conventions, arrays, figures, verdict
    )


class _Numbers:
    """The numbers of a finding, each with the same statistic of what it is held against."""

    def __init__(self, headline: str) -> None:
        self.headline = headline
        self.measured: dict[str, float] = {}
        self.interval: dict[str, Any] = {}
        self.null: dict[str, float] = {}

    def add(
        self, key: str, statistic: Callable[[np.ndarray], Any], per_path: Mapping[str, np.ndarray], **references: float
    ) -> None:
        """The statistic of "model" is measured; those of the others, and exact `references`, are nulls."""
        self.measured[key] = float(statistic(per_path["model"]))
        self.interval[key] = bootstrap(statistic, per_path["model"])
        nulls = {name: float(statistic(x)) for name, x in per_path.items() if name != "model"} | references
        self.null |= {name if key == self.headline else f"{key}.{name}": value for name, value in nulls.items()}


def _lengths(first: int, last: int) -> list[int]:
    """Context lengths: doubled from `first` on, and `last`."""
    last = max(last, 1)
    doubled = [first << i for i in range(64) if first << i <= last]
    return doubled if doubled and last < 1.4 * doubled[-1] else [*doubled, last]


def _shuffle(rows: Int[np.ndarray, "n N"], length: int, seed: int) -> Int[np.ndarray, "n N"]:
    """The first `length` tokens of each path permuted."""
    context = np.random.default_rng([seed, length]).permuted(rows[:, :length], axis=1)
    return np.concatenate([context, rows[:, length:]], axis=1)


def _enumerated_entropies(
    model: Transformer, world: Any, contexts: Mapping[int, np.ndarray], steps: int
) -> dict[str, Float[np.ndarray, "n lengths"]]:
    """Entropy of the next `steps` tokens after each context, of the model, and of the world if there is one.

    By the chain rule: the entropies of the steps, weighted with the probability of what leads to each. So the
    last step is not enumerated.
    """
    after = continuations(model.vocab_size, steps - 1) if steps > 1 else np.zeros((1, 0), np.int32)
    n, length = next(iter(contexts.values())).shape
    rows = np.empty((len(contexts), n, len(after), length), np.int32)
    for i, (cut, paths) in enumerate(contexts.items()):
        rows[i] = paths[:, None]
        rows[i, :, :, cut : cut + steps - 1] = after
    observed = observe(model, world, rows.reshape(-1, length))
    laws = {"model": (observed.log_prob, observed.entropy)}
    if world is not None:
        laws["world"] = (observed.world_log_prob, observed.world_entropy)
    found = {}
    for name, fields in laws.items():
        log_prob, entropy = (x.reshape(*rows.shape[:3], length - 1) for x in fields)
        found[name] = np.stack(
            [
                np.sum(
                    np.exp(log_prob[i, ..., at : at + steps - 1].sum(-1)) * entropy[i, ..., at : at + steps].sum(-1), -1
                )
                for i, at in enumerate(cut - 1 for cut in contexts)
            ],
            axis=1,
        )
    return found


def _sampled_entropies(
    model: Transformer, world: Any, contexts: Mapping[int, np.ndarray], steps: int, seed: int
) -> dict[str, Float[np.ndarray, "n lengths"]]:
    """The same estimated without bias from one sampled continuation of each context. There is no world's."""
    rows, n = np.concatenate(list(contexts.values())), len(next(iter(contexts.values())))
    given = np.repeat(list(contexts), n)
    _, entropy = _walk_on(model, rows, given, given - 1 + steps, np.tile(np.arange(n), len(contexts)), seed)
    after = np.take_along_axis(entropy, given[:, None] - 1 + np.arange(steps), axis=1).sum(axis=1)
    return {"model": after.reshape(len(contexts), n).T}


@jax.jit
def _recurrent(
    model: Transformer,
    seed: Array,
    rows: Int[Array, "B N"],
    given: Int[Array, " B"],
    until: Int[Array, " B"],
    numbers: Int[Array, " B"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    T = rows.shape[1] - 1
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(given), numbers)

    def one(
        i: Array, state: State, token: Array, known: Array, given: Array, key: Array
    ) -> tuple[State, Array, Array, Array]:
        state, logits = step(model, state, token)
        law = jax.nn.log_softmax(logits)
        sampled = jax.random.categorical(jax.random.fold_in(key, i), law).astype(token.dtype)
        after = jnp.where(i + 1 < given, known, sampled)
        return state, after, law[after], -jnp.sum(jnp.exp(law) * law)

    def body(i: Array, carry: tuple[State, Array, Array, Array]) -> tuple[State, Array, Array, Array]:
        state, tokens, log_prob, entropy = carry
        state, tokens, p, h = jax.vmap(one, (None, 0, 0, 0, 0, 0))(i, state, tokens, rows[:, i + 1], given, keys)
        return state, tokens, log_prob.at[:, i].set(p), entropy.at[:, i].set(h)

    state = jax.vmap(lambda _: init_state(model, T))(rows[:, 0])
    unknown = jnp.zeros((len(rows), T))
    return lax.fori_loop(0, until.max(), body, (state, rows[:, 0], unknown, unknown))[2:]


def _walk_on(
    model: Transformer,
    rows: Int[np.ndarray, "n N"],
    given: Int[np.ndarray, " n"],
    until: Int[np.ndarray, " n"],
    numbers: Int[np.ndarray, " n"],
    seed: int,
) -> tuple[Float[np.ndarray, "n T"], Float[np.ndarray, "n T"]]:
    """Walk the first `given` tokens of each path by the recurrent form, then on, by sampling, for `until` steps in all.

    Log-probability of each token that came, and entropy of its law, of these steps at least. Each path has the random
    numbers of its number. One compilation serves all lengths, and as every step reads all weights, many paths are
    walked together: as far as the longest goes, so order them by length.
    """
    walk = functools.partial(_recurrent, model, np.int32(seed))
    # One law and one state of each path are held at a time.
    T = rows.shape[1] - 1
    batch = min(batch_size(model, 1), 1 << max(0, ((1 << 26) // max(1, model.state_size(T))).bit_length() - 1), 64)
    return in_batches(walk, batch, *(a.astype(np.int32) for a in (rows, given, until, numbers)))


def _chain_rule(
    model: Transformer, world: Any, rows: Int[np.ndarray, "n N"], lengths: list[int]
) -> tuple[float, dict[str, float]]:
    """Largest error of the chain rule in nats, and what it is held against."""
    N = rows.shape[1]
    whole = np.full(len(rows), N)
    steps, _ = _walk_on(model, rows, whole, whole - 1, np.arange(len(rows)), 0)
    joint = observe(model, world, rows).log_prob.sum(axis=1)
    cut_off = np.concatenate([np.where(np.arange(N) < cut, rows, 0) for cut in lengths])
    swapped = np.concatenate([np.where(np.arange(N) < cut, np.roll(rows, 1, axis=0), rows) for cut in lengths])
    alone, after_other = (observe(model, world, x).log_prob.reshape(-1, *steps.shape) for x in (cut_off, swapped))
    errors, changes = [], []
    for i, cut in enumerate(lengths):
        conditional = steps[:, cut - 1 :].sum(axis=1)
        errors.append(np.abs(conditional - (joint - alone[i, :, : cut - 1].sum(axis=1))).max())
        changes.append(np.abs(conditional - after_other[i, :, cut - 1 :].sum(axis=1)).mean())
    rounding = float(jnp.finfo(model.embed.table.dtype).eps * np.abs(joint).max())
    return float(np.max(errors)), {"exact": 0.0, "rounding": rounding, "other_context": float(np.mean(changes))}


def _at(fields: list[np.ndarray], lengths: list[int]) -> Float[np.ndarray, "n lengths"]:
    """A field of the law right after each context, from one array [n, T] for each length."""
    return np.stack([field[:, cut - 1] for field, cut in zip(fields, lengths, strict=True)], axis=1)


def _shuffle_cost(
    true: Float[np.ndarray, "n T"], lost: list[np.ndarray], lengths: list[int], steps: int
) -> Float[np.ndarray, "n longer"]:
    """What shuffling the context costs the next `steps` true tokens, in nats per token, for lengths above 1."""
    after = {cut: slice(cut - 1, cut - 1 + steps) for cut in lengths}
    costs = [
        (true[:, after[cut]] - x[:, after[cut]]).mean(axis=1) for x, cut in zip(lost, lengths, strict=True) if cut > 1
    ]
    return np.stack(costs, axis=1) if costs else np.zeros((len(true), 0))


def _ideal_loss(world: Any, entropy: Float[np.ndarray, "n T"]) -> tuple[Float[np.ndarray, " T"], str]:
    """The loss, at each position, of the observer who knows the world, and how it was found."""
    if isinstance(world, HiddenMarkov):
        with contextlib.suppress(ValueError):  # its beliefs may be too many
            exact = world.ideal_loss(entropy.shape[1] + 1, tol=1e-4, max_beliefs=4000)
            return np.asarray(exact, np.float64)[1:], "the ideal loss is exact to 1e-4"
    return entropy.mean(axis=0), "the ideal loss is a mean over the same paths"
