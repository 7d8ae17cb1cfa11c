"""C3: there is no learning in context; a context only narrows the set of paths that are left.

Learning and narrowing differ where each path is of one of several tasks, a mixture world. If a context only narrows,
the model predicts as the exact posterior over the tasks and states that it was trained on does, and better than
observers who know the world but narrow less: one who expects a single task, one who never updates the probabilities of
the tasks, one who reads the last few tokens only. On every world and text: the entropy of the law of the next few
tokens falls more after the true context than after one whose tokens are shuffled.

Beside these, the loss by position, held against that of the observer who knows the world. The chain rule,
P(continuation | context) = P(context continuation) / P(context), holds for every autoregressive model: a self-check.
"""

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.evidence import engine
from jaxwalk.evidence.decision import Check, Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.finding import Figure, Finding, Series
from jaxwalk.evidence.laws import Steps, check_data, held_out, observe
from jaxwalk.evidence.statistics import mean_interval
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import State, Transformer, init_state, step
from jaxwalk.paths import continuations
from jaxwalk.worlds import HiddenMarkov
from jaxwalk.worlds.mixture import Mixture

CLAIM = "C3: there is no learning in context: a context only narrows the set of paths that are left."
LABELS = {
    "model": "model",
    "world": "world, exact",
    "ideal": "observer who knows the world",
    "shuffled": "model, shuffled context",
    "shuffled_world": "world, shuffled context",
    "untrained": "untrained model",
    "best_task": "best single task",
    "prior": "tasks never updated",
    "window": "last tokens only",
}
RESTRICTED = ("best_task", "prior", "window")

EXCESS = 0.01
"""Nats per token: a hundredth, 1% of a token's probability, is as near to the exact posterior as could matter."""
LEAD = 0.005
"""Nats per token by which an observer must be beaten: half of `EXCESS`, so that a model near the posterior can."""
NARROWER = 0.01
"""Nats by which the true context must narrow more than a shuffled one, where no world says how much it could."""
SHARE = 0.5
"""Of the world's own difference between true and shuffled contexts, how much the model must have: most of it."""
LAWS = 1 << 25
"""The number of probabilities of the laws along the held-out paths, unless the number of paths is chosen."""
STATES = 1 << 26
"""About the most numbers of decoding states that are held at once."""


class _Plan(NamedTuple):
    """What is measured.

    Attributes:
        rows: [n, T + 1], the held-out paths.
        documents: [n], the document of each.
        contexts: how many of them are contexts of path entropies.
        lengths: of the contexts.
        steps: how many tokens path entropies are of.
        exact: whether these are enumerated.
        shuffled: for each length, the contexts with their tokens permuted.
    """

    rows: Int[np.ndarray, "n N"]
    documents: Int[np.ndarray, " n"]
    contexts: int
    lengths: list[int]
    steps: int
    exact: bool
    shuffled: dict[int, Int[np.ndarray, "m N"]]

    @property
    def true(self) -> dict[int, Int[np.ndarray, "m N"]]:
        """For each length, the contexts."""
        return dict.fromkeys(self.lengths, self.rows[: self.contexts])


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

    Args:
        subject: the model and its data.
        paths: held-out paths; by default 512 of a world, 128 of text, fewer of a large vocabulary.
        contexts: how many of them are contexts of path entropies; by default 64, 32, or a quarter of them.
        steps: n of the n-step path entropy; by default as many as leave at most `enumerated` continuations to walk, or,
            where these are none, 8 by sampling.
        enumerated: the most continuations of a context that are walked.
        light: use fewer paths, as `training_walk` does.
    """
    check_data(subject)
    model, world = subject.model, subject.world
    plan = _planned(subject, paths, contexts, steps, enumerated, light)
    models = {"model": model} | ({} if subject.untrained is None else {"untrained": subject.untrained})
    entropy = _path_entropies(models, world, plan, subject.seed)
    true = {name: observe(law, world, plan.rows) for name, law in models.items()}
    lost = {name: observe(law, world, np.concatenate(list(plan.shuffled.values()))) for name, law in models.items()}
    kl = {name: steps.kl for name, steps in true.items()}
    if isinstance(world, Mixture):
        kl |= _restricted_observers(subject, world, plan.rows)

    T, V = plan.rows.shape[1] - 1, model.vocab_size
    ideal, ideal_is = (np.zeros(T), "") if world is None else _ideal_loss(world, true["model"].world_entropy)
    quantities = _quantities(plan, entropy, true, lost, kl, ideal, V)
    primary = (
        *_against_observers(world, kl, plan),
        _against_shuffled(subject, plan, entropy, true, lost),
    )
    arrays = _arrays(plan, entropy, kl, ideal, world)
    return Finding(
        "narrowing",
        CLAIM,
        **numbers(quantities),
        conventions=_conventions(plan, world, ideal_is),
        arrays=arrays,
        figures=_figures(plan, arrays),
        primary=primary,
        checks=(_chain_rule(model, world, plan),),
    )


def _planned(
    subject: Subject, paths: int | None, contexts: int | None, steps: int | None, enumerated: int, light: bool
) -> _Plan:
    """The paths, the lengths of contexts, and the steps, as far as they are not chosen."""
    world, V = subject.world, subject.model.vocab_size
    default_paths, default_contexts = (64, 16) if light else (128, 32) if world is None else (512, 64)
    draw = held_out(subject, paths or default_paths)
    T = draw.tokens.shape[1] - 1
    most = max(8, LAWS // (V * (T + 1)))
    rows, documents = (draw.tokens, draw.documents) if paths else (draw.tokens[:most], draw.documents[:most])
    count = min(contexts or min(default_contexts, max(8, most // 4)), len(rows))
    if steps is None:
        longest = 1 + int(math.log(enumerated) / math.log(max(V, 2)) + 1e-9)
        steps = min(longest if longest > 1 else 8, max(1, T // 4))
    # In models of text a single token is often an attention sink, and no context like others.
    lengths = _lengths(1 if world is not None else 2, T - steps + 1)
    shuffled = {length: _shuffle(rows[:count], length, subject.seed) for length in lengths}
    return _Plan(rows, documents, count, lengths, steps, V ** (steps - 1) <= enumerated, shuffled)


def _lengths(first: int, last: int) -> list[int]:
    """Context lengths: doubled from `first` on, and `last`."""
    last = max(last, 1)
    doubled = [first << i for i in range(64) if first << i <= last]
    return doubled if doubled and last < 1.4 * doubled[-1] else [*doubled, last]


def _shuffle(rows: Int[np.ndarray, "n N"], length: int, seed: int) -> Int[np.ndarray, "n N"]:
    """The first `length` tokens of each path permuted."""
    context = np.random.default_rng([seed, length]).permuted(rows[:, :length], axis=1)
    return np.concatenate([context, rows[:, length:]], axis=1)


# What is measured


def _path_entropies(
    models: Mapping[str, Transformer], world: Any, plan: _Plan, seed: int
) -> dict[str, Float[np.ndarray, "m lengths"]]:
    """The entropy of the next tokens after each context: of each model, after shuffled contexts, of the world."""
    entropies = _enumerated_entropies if plan.exact else functools.partial(_sampled_entropies, seed=seed)
    found = entropies(models["model"], world, plan.true, plan.steps)
    shuffled = entropies(models["model"], world, plan.shuffled, plan.steps)
    found |= {"shuffled": shuffled["model"]} | ({"shuffled_world": shuffled["world"]} if "world" in shuffled else {})
    if "untrained" in models:
        found["untrained"] = entropies(models["untrained"], world, plan.true, plan.steps)["model"]
    return found


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
    found = []
    for cut, rows in contexts.items():
        _, entropy = _walked(model, rows, cut, cut - 1 + steps, seed)
        found.append(entropy[:, cut - 1 : cut - 1 + steps].sum(axis=1))
    return {"model": np.stack(found, axis=1)}


def walk_on(
    model: Transformer, row: Int[Array, " N"], number: Int[Array, ""], seed: Array, given: Array, until: Array
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Walk the first `given` tokens of a path by the recurrent form, then on by sampling, for `until` steps in all.

    Returns:
        The log-probability of each token that came, and the entropy of its law; 0 after the last step.
    """
    T = len(row) - 1
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), given), number)

    def body(i: Array, carry: tuple[State, Array, Array, Array]) -> tuple[State, Array, Array, Array]:
        state, token, log_prob, entropy = carry
        state, logits = step(model, state, token)
        law = jax.nn.log_softmax(logits)
        sampled = jax.random.categorical(jax.random.fold_in(key, i), law).astype(token.dtype)
        after = jnp.where(i + 1 < given, row[i + 1], sampled)
        return state, after, log_prob.at[i].set(law[after]), entropy.at[i].set(-jnp.sum(jnp.exp(law) * law))

    unknown = jnp.zeros(T)
    return lax.fori_loop(0, until, body, (init_state(model, T), row[0], unknown, unknown))[2:]


def _walked(
    model: Transformer, rows: Int[np.ndarray, "n N"], given: int, until: int, seed: int
) -> tuple[Float[np.ndarray, "n T"], Float[np.ndarray, "n T"]]:
    """`walk_on` of each path: many at once, as one law of each is held at a time and every step reads all weights."""
    widest = 4 * model.width + model.vocab_size
    at_once = max(1, min(engine.ELEMENTS // widest, STATES // max(1, model.state_size(rows.shape[1] - 1))))
    shared = (np.int32(seed), np.int32(given), np.int32(until))
    elements = at_once * rows.shape[1] * widest
    return engine.measure(
        walk_on, model, rows.astype(np.int32), np.arange(len(rows), dtype=np.int32), shared=shared, elements=elements
    )


def possible(_: None, row: Int[Array, " N"], world: Any) -> Bool[Array, " T"]:
    """Whether the world allows the first t + 1 tokens of a path."""
    return ~jnp.isnan(world.next_log_probs(row[:-1])[1:]).any(axis=-1)


def observer_excess(_: None, row: Int[Array, " N"], world: Mixture) -> Float[Array, "observers T"]:
    """KL(exact posterior predictive || law) along a path, of observers who know a mixture world but narrow less.

    The first K expect one task each. The next knows the state in each task, but gives the tasks their prior weights
    for ever (of those that remain possible). The last reads the last tokens only.
    """
    before = row[:-1]
    log_truth = world.next_log_probs(before)[1:]
    by_task = world.task_log_probs(before)[:, 1:]
    alive = ~jnp.isnan(by_task).any(axis=-1, keepdims=True)
    p = jnp.where(alive, jnp.exp(by_task), 0)
    weights = jnp.asarray(world.weights, p.dtype)[:, None, None] * alive
    prior = jnp.sum(weights * p, axis=0) / weights.sum(axis=0)
    laws = jnp.concatenate(
        [jnp.log(p), jnp.log(prior)[None], world.windowed_log_probs(before, _window(len(before)))[None, 1:]]
    )
    truth = jnp.exp(log_truth)
    return jnp.sum(jnp.where(truth > 0, truth * (jnp.where(truth > 0, log_truth, 0) - laws), 0), axis=-1)


def _restricted_observers(
    subject: Subject, world: Mixture, rows: Int[np.ndarray, "n N"]
) -> dict[str, Float[np.ndarray, "n T"]]:
    """The excess of each of `RESTRICTED`. The best task is that of other paths."""
    others = subject.draw(len(rows), rows.shape[1], to_fit=True).tokens
    late = _late(rows.shape[1] - 1)
    fitted, excess = (
        engine.measure(observer_excess, None, x.astype(np.int32), shared=(world,)) for x in (others, rows)
    )
    best = int(fitted[:, :-2, -late:].mean(axis=(0, 2)).argmin())
    found = {"best_task": excess[:, best], "prior": excess[:, -2], "window": excess[:, -1]}
    return {name: values for name, values in found.items() if np.isfinite(values).all()}


def _late(T: int) -> int:
    """The number of the late positions, a quarter of all."""
    return max(1, T // 4)


def _window(T: int) -> int:
    """The number of tokens that the observer of the last tokens reads, a quarter of all."""
    return max(1, T // 4)


def _chain_rule(model: Transformer, world: Any, plan: _Plan) -> Check:
    """The largest error of the chain rule, of the recurrent against the parallel form, on some paths."""
    rows, lengths = plan.rows[: min(16, plan.contexts)], plan.lengths
    N = rows.shape[1]
    steps, _ = _walked(model, rows, N, N - 1, 0)
    joint = observe(model, world, rows).log_prob.sum(axis=1)
    errors = []
    for cut in sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]}):
        alone = observe(model, world, np.where(np.arange(N) < cut, rows, 0)).log_prob[:, : cut - 1].sum(axis=1)
        errors.append(np.abs(steps[:, cut - 1 :].sum(axis=1) - (joint - alone)).max())
    rounding = float(jnp.finfo(model.embed.table.dtype).eps * np.abs(joint).max())
    return Check(
        "chain_rule_error",
        float(np.max(errors)),
        1e-4 + 16 * rounding,
        "log P(continuation | context), by the recurrent form, is log P(context continuation) - log P(context), by the "
        "parallel form, in nats",
    )


# What decides


def _against_observers(world: Any, kl: dict[str, np.ndarray], plan: _Plan) -> tuple[Contrast, ...]:
    """The model against the exact posterior predictive, and against the strongest observer who narrows less."""
    exact = "late in a path, predictions are those of the exact posterior over tasks and states"
    better = "late in a path, predictions are better than those of every observer who narrows less"
    if not isinstance(world, Mixture):
        reason = "the data is no mixture of known tasks, so that learning in context and narrowing would not differ"
        return untestable("C3", exact, "late_excess", reason), untestable("C3", better, "late_excess", reason)
    quantity = _late_excess(plan, kl)
    strongest = min((name for name in RESTRICTED if name in kl), key=quantity.references.__getitem__)
    if not quantity.references[strongest] > EXCESS:
        reason = f"on this mixture, narrowing less (observer: {LABELS[strongest]}) costs at most {EXCESS} nat"
        return untestable("C3", exact, "late_excess", reason), untestable("C3", better, "late_excess", reason)
    return (
        quantity.contrast("exact", "C3", exact, at_most=EXCESS, label="exact posterior"),
        quantity.contrast(strongest, "C3", better, at_most=-LEAD, label=f"observer: {LABELS[strongest]}"),
    )


def _late_excess(plan: _Plan, kl: dict[str, np.ndarray]) -> Quantity:
    late = _late(plan.rows.shape[1] - 1)
    each = {name: values[:, -late:].mean(axis=1) for name, values in kl.items()}
    return Quantity("late_excess", each.pop("model"), {"exact": 0.0, **each}, documents=plan.documents)


def _against_shuffled(
    subject: Subject,
    plan: _Plan,
    entropy: dict[str, np.ndarray],
    true: dict[str, Steps],
    lost: dict[str, Steps],
) -> Contrast:
    """How much more the true context narrows than a shuffled one, against half the world's own difference."""
    what = f"next {plan.steps} tokens" if plan.exact and plan.steps > 1 else "next token"
    statement = f"the true context leaves less open about the {what} than a shuffled one does"
    longer = [i for i, length in enumerate(plan.lengths) if length > 1]
    documents = plan.documents[: plan.contexts]
    if not longer:
        return untestable("C3", statement, "order_narrowing", "contexts have one token, in which there is no order")
    widened = {name: _next_entropies(plan, lost[name].entropy, true[name].entropy)[:, longer] for name in true}
    if subject.world is None:
        values = {name: each.mean(axis=1) for name, each in widened.items()}
        null = "untrained" if "untrained" in values else "none"
        nulls = {"none": 0.0, **{name: x for name, x in values.items() if name != "model"}}
        quantity = Quantity("order_narrowing", values["model"], nulls, documents=documents)
        return quantity.contrast(null, "C3", statement, at_least=NARROWER, label=LABELS.get(null, "no difference"))
    own = _next_entropies(plan, lost["model"].world_entropy, true["model"].world_entropy)[:, longer]
    model = widened["model"]
    if "world" in entropy:
        model = (entropy["shuffled"] - entropy["model"])[:, longer]
        own = (entropy["shuffled_world"] - entropy["world"])[:, longer]
    rows = np.concatenate(list(plan.shuffled.values())).astype(np.int32)
    allowed = engine.measure(possible, None, rows, shared=(subject.world,))
    at_cut = _at(np.split(allowed, len(plan.lengths)), plan.lengths)[:, longer].astype(bool)
    some = at_cut.any(axis=1)
    mean = lambda x: np.where(at_cut, x, 0)[some].sum(axis=1) / at_cut[some].sum(axis=1)
    quantity = Quantity("order_narrowing", mean(model), {"world": SHARE * mean(own)}, documents=documents[some])
    least = Quantity("", mean(own), documents=documents[some]).interval if some.any() else None
    if least is None:
        return untestable("C3", statement, "order_narrowing", "the world forbids nearly all shuffled contexts")
    if not (least[0] > 0 and quantity.references["world"] > SHARE * NARROWER):
        reason = (
            f"the order of the context is worth nothing, or below {NARROWER} nat, to the observer who knows the world"
        )
        return untestable("C3", statement, "order_narrowing", reason)
    label = "half of what it is worth to the observer who knows the world"
    return quantity.contrast("world", "C3", statement, at_least=0.0, label=label)


def _next_entropies(
    plan: _Plan, shuffled: Float[np.ndarray, "rows T"], true: Float[np.ndarray, "n T"]
) -> Float[np.ndarray, "m lengths"]:
    """How much more is open about the next token after each shuffled context than after the true one."""
    after = _at(np.split(shuffled, len(plan.lengths)), plan.lengths)
    return after - _at([true[: plan.contexts]] * len(plan.lengths), plan.lengths)


def _at(fields: list[np.ndarray], lengths: list[int]) -> Float[np.ndarray, "n lengths"]:
    """A field of the law right after each context, from one array [n, T] for each length."""
    return np.stack([field[:, cut - 1] for field, cut in zip(fields, lengths, strict=True)], axis=1)


# The numbers, arrays and figures


def _quantities(
    plan: _Plan,
    entropy: dict[str, np.ndarray],
    true: dict[str, Steps],
    lost: dict[str, Steps],
    kl: dict[str, np.ndarray],
    ideal: Float[np.ndarray, " T"],
    V: int,
) -> list[Quantity]:
    """All numbers of the finding."""
    some, lengths, steps = plan.documents[: plan.contexts], plan.lengths, plan.steps
    on_world = "world" in entropy

    def of(name: str, each: Mapping[str, np.ndarray], documents: Any, unit: str = "nats", **exact: float) -> Quantity:
        nulls = {null: values for null, values in each.items() if null != "model"} | exact
        return Quantity(name, each["model"], nulls, unit, documents=documents)

    fall = {name: h[:, 0] - h[:, -1] for name, h in entropy.items()}
    end = {name: h[:, -1] for name, h in entropy.items()}
    counts = {name: h[:, None] for name, h in end.items() if name != "model"}
    found = [
        of("narrowing", fall, some),
        of("path_entropy", end, some, uniform=steps * math.log(V)),
        Quantity(
            "effective_paths", end["model"][:, None], {**counts, "uniform": float(V) ** steps}, "paths",
            lambda means: np.exp(means[..., 0]), some,
        ),
    ]  # fmt: skip
    # Of one context at a time, so it needs exact entropies.
    if doubled := [i for i in range(len(lengths) - 1) if lengths[i + 1] == 2 * lengths[i]]:
        each = entropy
        if not plan.exact:
            each = {name: _at([x.entropy[: plan.contexts]] * len(lengths), lengths) for name, x in true.items()}
            each["shuffled"] = _at(np.split(lost["model"].entropy, len(lengths)), lengths)
        fell = {n: (h[:, [i + 1 for i in doubled]] < h[:, doubled]).mean(axis=1) for n, h in each.items()}
        found.append(of("doublings_that_narrow", fell, some, "share", coin=0.5))
    if on_world:
        off = {name: np.abs(entropy[name] - entropy["world"]).mean(axis=1) for name in true}
        found.append(of("entropy_error", off, some, exact=0.0))
    if true["model"].world_entropy.any():
        found.append(of("excess_at_end", {name: kl[name][:, -1] for name in true}, plan.documents, ideal=0.0))
    if set(RESTRICTED) & set(kl):
        found.append(_late_excess(plan, kl))
    if lengths[-1] > 1:
        cost = {name: _shuffle_cost(plan, true[name].log_prob, lost[name].log_prob) for name in true}
        found.append(of("shuffle_cost", cost, some, "nats per token", order_blind=0.0))
    late = _late(len(ideal))
    gain = {name: (x.kl + x.world_entropy)[:, 0] - (x.kl + x.world_entropy)[:, -late:].mean(axis=1)
            for name, x in true.items()}  # fmt: skip
    reference = {"ideal": float(ideal[0] - ideal[-late:].mean())} if ideal.any() else {}
    return [*found, of("loss_gain", gain, plan.documents, "nats", **reference)]


def _shuffle_cost(
    plan: _Plan, true: Float[np.ndarray, "n T"], lost: Float[np.ndarray, "rows T"]
) -> Float[np.ndarray, " m"]:
    """What shuffling the context costs the next true tokens, in nats per token, mean over lengths above 1."""
    costs = []
    for cut, shuffled in zip(plan.lengths, np.split(lost, len(plan.lengths)), strict=True):
        after = slice(cut - 1, cut - 1 + plan.steps)
        costs.append((true[: plan.contexts, after] - shuffled[:, after]).mean(axis=1))
    return np.mean([cost for cut, cost in zip(plan.lengths, costs, strict=True) if cut > 1], axis=0)


def _ideal_loss(world: Any, entropy: Float[np.ndarray, "n T"]) -> tuple[Float[np.ndarray, " T"], str]:
    """The loss, at each position, of the observer who knows the world, and how it was found."""
    if isinstance(world, HiddenMarkov):
        with contextlib.suppress(ValueError):  # its beliefs may be too many
            exact = world.ideal_loss(entropy.shape[1] + 1, tol=1e-4, max_beliefs=4000)
            return np.asarray(exact, np.float64)[1:], "the ideal loss is exact to 1e-4"
    return entropy.mean(axis=0), "the ideal loss is a mean over the same paths"


def _arrays(
    plan: _Plan, entropy: dict[str, np.ndarray], kl: dict[str, np.ndarray], ideal: np.ndarray, world: Any
) -> dict[str, np.ndarray]:
    T = plan.rows.shape[1] - 1
    arrays = {"context_length": np.array(plan.lengths), "position": np.arange(1, T + 1)}
    arrays["entropy_per_path"] = entropy["model"]
    for name, h in entropy.items():
        arrays[f"entropy_{name}"], arrays[f"effective_paths_{name}"] = h.mean(axis=0), np.exp(h.mean(axis=0))
    arrays["entropy_model_low"], arrays["entropy_model_high"] = mean_interval(entropy["model"])
    for name, values in kl.items():
        arrays[f"loss_{name}"] = ideal + values.mean(axis=0)
    # What varies on a world is the excess: the ideal loss is the same for every sample of paths.
    arrays["loss_model_low"], arrays["loss_model_high"] = (ideal + end for end in mean_interval(kl["model"]))
    if world is not None:
        arrays["loss_ideal"] = ideal
    if isinstance(world, Mixture):
        arrays |= {f"excess_{name}": values.mean(axis=0) for name, values in kl.items()}
        arrays["excess_model_low"], arrays["excess_model_high"] = mean_interval(kl["model"])
    return arrays


def _figures(plan: _Plan, arrays: dict[str, np.ndarray]) -> tuple[Figure, ...]:
    """The path entropy by context length, and the loss, and on a mixture the excess of observers, by position."""

    def lines(what: str, x: str, names: list[str]) -> tuple[Series, ...]:
        band = lambda name, end: f"{what}_model_{end}" if name == "model" else None
        return tuple(
            Series(
                LABELS[name],
                f"{what}_{name}",
                x,
                low=band(name, "low"),
                high=band(name, "high"),
                dashed=name != "model",
            )
            for name in names
            if f"{what}_{name}" in arrays
        )

    on_world = "loss_ideal" in arrays
    excess = Figure(
        name="excess_by_position",
        title="Excess over the exact posterior predictive, by position",
        x_label="tokens of context",
        y_label="KL, nats per token",
        series=lines("excess", "position", ["model", *RESTRICTED]),
    )
    entropies = Figure(
        name="path_entropy",
        title=f"What is left open about the next {plan.steps} tokens, by length of the context",
        x_label="tokens of context",
        y_label="path entropy, nats",
        series=lines("entropy", "context_length", ["model", "world", "shuffled"]),
        log_x=True,
    )
    loss = Figure(
        name="loss_by_position",
        title="Loss by position" + (", beside the observer who knows the world" if on_world else ""),
        x_label="tokens of context",
        y_label="loss, nats per token",
        series=lines("loss", "position", ["model", "ideal"] if on_world else ["model", "untrained"]),
    )
    return (excess, entropies, loss) if "excess_model" in arrays else (entropies, loss)


def _conventions(plan: _Plan, world: Any, ideal_is: str) -> dict[str, Any]:
    T, steps = plan.rows.shape[1] - 1, plan.steps
    conventions: dict[str, Any] = {
        "units": "nats",
        "paths": len(plan.rows),
        "documents": len(np.unique(plan.documents)),
        "tokens_per_path": T + 1,
        "contexts": plan.contexts,
        "context_lengths": plan.lengths,
        "steps": steps,
        "narrowing": f"fall of the mean {steps}-step path entropy from the shortest context to the longest, by "
        + (
            "enumeration" if plan.exact else "one sampled continuation of each context: the sum of its steps' entropies"
        ),
        "path_entropy": "at the longest context; effective_paths is exp of the mean entropy",
        "doublings_that_narrow": "share of contexts with less entropy than their first half, over paths and lengths, "
        + (f"of the next {steps} tokens" if plan.exact else "of the next token, which is exact"),
        "order_narrowing": "entropy after a context with its tokens permuted, less that after the true one, mean over "
        "lengths of 2 or more and, on a world, over the permuted contexts that it allows",
        "shuffle_cost": f"loss of the next {steps} tokens after a shuffled context less that after the true one, mean "
        "over lengths of 2 or more",
        "loss": "of the tokens that came" if world is None else f"in expectation over the next token; {ideal_is}",
        "loss_gain": f"loss at the first position less the mean of the last {_late(T)}",
    }
    if world is not None:
        conventions["excess_at_end"] = "E KL(world || model) of the step at the last position"
    if isinstance(world, Mixture):
        conventions |= {
            "late_excess": f"KL(exact posterior predictive || model), mean over the last {_late(T)} positions",
            "best_task": "the task whose law has the least late excess on other paths, whatever the context says",
            "prior": "knows the state in each task, but never updates the probabilities of tasks",
            "window": f"the exact posterior predictive after the last {_window(T)} tokens only",
        }
    return conventions
