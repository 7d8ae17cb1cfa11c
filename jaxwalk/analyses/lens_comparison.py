"""C6: each step of the encoding walk builds up the final law, so every station should already say something of it.

What a station says depends on the lens it is read through (`jaxwalk.lenses`): the identity, the mean Jacobian of the
last station, the least-squares map, or the map tuned to give the final law. Each is fitted on some paths and read on
others, as KL(final || lens) per station. What an affine map can make of a station is not yet what the model makes
of it: the maps are nearer to the final law the more they are fitted to it.

Nulls: the same lenses, fitted in the same way, of the untrained model; and one law for all contexts, the mean of the
final laws, which a map can give that does not look at its station.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import batches, mean_interval, resampled_means
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.probes.lenses import LOGIT_LENS, Lens, jacobian_lens, least_squares_lens, read, tuned_lens

CLAIM = "C6: context vectors are composed station by station, and each station already holds part of the final law."
LABELS = {
    "logit": "logit lens",
    "jacobian": "Jacobian lens",
    "least_squares": "least-squares lens",
    "tuned": "tuned lens",
}
FLOATS = 1 << 24
"""How many numbers of one station's laws, or of all stations, a batch may hold."""
PLACES = 1 << 25
"""How many numbers of stations may be held in all."""
FEWEST_STEPS = 50
"""Of the tuned lens's training: after fewer it is near where it began."""


def analyse(
    subject: Subject,
    *,
    paths: int = 128,
    jacobians: int = 64,
    steps: int = 400,
    batch: int = 256,
    length: int = 128,
    work: float = 2e12,
) -> Finding:
    """The four lenses, fitted on `paths` paths and read on as many others.

    jacobians: how many derivatives the Jacobian lens is the mean of. steps, batch: of the tuned lens's training.
    length: the most positions of a path; position 0 is left out. work: floating-point operations that the derivatives
    may take, roughly; training may take ten times as much, and reading by a lens half as much. For a large model there
    are fewer derivatives, steps and paths that are read, and a lens that gets too few is left out.
    """
    model, S = subject.model, 2 * subject.model.depth + 1
    if S < 2:
        raise NotApplicable("the model has no layers, and so one station only, which every lens reads alike")
    T = min(length, subject.length)
    if T < 2:
        raise NotApplicable("paths have one token, and position 0 is no evidence")
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths: {subject.no_data}")
    paths = max(8, min(paths, PLACES // (2 * S * (T - 1) * model.width)))
    tokens = subject.paths(2 * paths, T)
    paths = min(paths, len(tokens) // 2)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    of_law = 2.0 * model.vocab_size * model.width
    jacobians = min(jacobians, paths, int(work / (6.0 * weights * T * model.width)))
    steps = min(steps, int(10 * work / (4.0 * (S - 1) * batch * of_law)))
    readable = max(8, int(0.5 * work / (S * (T - 1) * of_law)))
    fitted, others = tokens[:paths], tokens[paths:][:readable]

    seen = {"": _readings(model, fitted, others, jacobians, steps, batch, subject.seed)}
    if not all(np.isfinite(kl).all() for kl, _ in seen[""].read.values()):
        raise NotApplicable("stations: expected finite numbers, got NaN. Analyse an earlier step.")
    if subject.untrained is not None:
        seen["untrained"] = _readings(subject.untrained, fitted, others, jacobians, steps, batch, subject.seed)
    names = list(seen[""].read)

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    for name in names:
        left, all_of_it = seen[""].share(name)
        draws = resampled_means(np.stack([left, all_of_it], axis=1), subject.seed)
        measured[f"share_{name}"] = 1 - float(left.mean() / all_of_it.mean())
        low, high = np.quantile(1 - draws[:, 0] / draws[:, 1], [0.025, 0.975])
        interval[f"share_{name}"] = (float(low), float(high))
        null[f"share_{name}.one_law"] = 0.0
        if "untrained" in seen:
            left, all_of_it = seen["untrained"].share(name)
            null[f"share_{name}.untrained"] = 1 - float(left.mean() / all_of_it.mean())
    for what, index in (("kl", 0), ("agreement", 1)):
        for name in names:
            per_path = seen[""].read[name][index][:, :-1].mean(1)
            measured[f"{what}_{name}"] = float(per_path.mean())
            low, high = mean_interval(per_path, subject.seed)
            interval[f"{what}_{name}"] = (float(low), float(high))
            if "untrained" in seen:
                null[f"{what}_{name}.untrained"] = float(seen["untrained"].read[name][index][:, :-1].mean())
            if what == "kl":
                null[f"kl_{name}.one_law"] = float(seen[""].one_law.mean())
            else:
                null[f"{what}_{name}.chance"] = 1 / model.vocab_size
    arrays: dict[str, np.ndarray] = {"station": np.arange(S), "one_law": np.full(S, seen[""].one_law.mean())}
    series = []
    for which, readings in seen.items():
        for name in names:
            key = f"kl_{name}" + (which and f"_{which}")
            kl = readings.read[name][0]
            arrays[key] = kl.mean(0)
            if which:
                continue
            arrays[f"{key}_low"], arrays[f"{key}_high"] = mean_interval(kl, subject.seed)
            series.append(Series(LABELS[name], key, "station", low=f"{key}_low", high=f"{key}_high"))
    if "untrained" in seen:
        series += [
            Series(f"{LABELS[n]}, untrained", f"kl_{n}_untrained", "station", dashed=True)
            for n in (names[0], names[-1])
        ]
    for name, lens in seen[""].lenses.items():
        if lens.weight is not None and lens.bias is not None:
            arrays |= {f"{name}_weight": np.asarray(lens.weight), f"{name}_bias": np.asarray(lens.bias)}
    figures = (
        Figure(
            "lenses",
            "How far the law of each station is from the final law, by the lens it is read through",
            "station of the encoding walk (after every step)",
            "KL(final || lens), nats",
            tuple(series),
            references={"one law for all contexts": float(seen[""].one_law.mean())},
        ),
    )
    conventions: dict[str, Any] = {
        "kl": "KL(final || lens), mean over stations but the last (where it is 0 exactly), positions, paths; nats",
        "share": "1 - kl / KL(final || one law for all contexts), means over paths: how much of what the context says",
        "agreement": "share of stations but the last whose most probable token is the final law's",
        "lens": "a map from each station to the last, then the final norm and the output map of the model",
        "logit": "the identity",
        "jacobian": f"mean derivative of the last station, of the same position, over {jacobians} paths, one position "
        "each; its bias is exact at their mean station"
        if "jacobian" in names
        else f"left out: fewer than 8 derivatives within the work of {work:g} floating-point operations",
        "least_squares": "ridge regression on the last station, ridge 1e-4 of the mean variance of a coordinate",
        "tuned": f"least KL(final || lens) by Adam from the identity, {steps} steps of {batch} places"
        if "tuned" in names
        else f"left out: fewer than {FEWEST_STEPS} steps within the work of {10 * work:g} floating-point operations",
        "fitted": f"on {paths} paths, read on {len(others)} others of {T} tokens; position 0 left out",
        "one_law": "the mean of the final laws on the fitted paths, for every context",
        "untrained": "its own lenses, fitted in the same way, against its own final law"
        if "untrained" in seen
        else "not available: this model has no step 0",
        "saved": "the fitted maps are in the arrays, as NAME_weight [S-1, D, D] and NAME_bias [S-1, D]: jaxwalk.Lens",
        "intervals": "95%, bootstrap over the paths that are read",
    }
    worst = max(names, key=lambda name: measured[f"kl_{name}"])
    best = min(names, key=lambda name: measured[f"kl_{name}"])
    beside = f", untrained {null[f'share_{best}.untrained']:.3f}" if "untrained" in seen else ""
    return Finding(
        name="lens_comparison",
        claim=CLAIM,
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=figures,
        verdict=(
            f"Read through the {LABELS[best]}, stations hold {measured[f'share_{best}']:.3f} "
            f"[{interval[f'share_{best}'][0]:.3f}, {interval[f'share_{best}'][1]:.3f}] of what the final law says "
            f"of its context{beside}, through the {LABELS[worst]} {measured[f'share_{worst}']:.3f}; they are "
            f"{measured[f'kl_{best}']:.4f} and {measured[f'kl_{worst}']:.4f} nat from it, at the first station "
            f"{arrays[f'kl_{best}'][0]:.3f} and {arrays[f'kl_{worst}'][0]:.3f} (one law for all contexts "
            f"{null[f'kl_{best}.one_law']:.3f})."
        ),
    )


class _Readings(NamedTuple):
    """The lenses of one model, fitted on some paths, and what they read on others.

    read: of each lens, KL(final || lens) and whether its top token is the final law's, means over positions, [paths, S]
    each. one_law: KL(final || mean final law of the fitted paths), [paths].
    """

    lenses: dict[str, Lens]
    read: dict[str, tuple[np.ndarray, np.ndarray]]
    one_law: np.ndarray

    def share(self, name: str) -> np.ndarray:
        """[2, paths]: what the lens leaves of the KL from one law for all contexts, and that KL."""
        return np.stack([self.read[name][0][:, :-1].mean(1), self.one_law])


def _readings(
    model: Transformer,
    fitted: Int[np.ndarray, "n T"],
    others: Int[np.ndarray, "m T"],
    jacobians: int,
    steps: int,
    batch: int,
    seed: int,
) -> _Readings:
    T, S = fitted.shape[1], 2 * model.depth + 1
    size = max(1, min(64, FLOATS // (T * max(model.vocab_size, S * model.width))))
    key = jax.random.fold_in(jax.random.key(seed), 0x1E45)
    parts, law = [], np.zeros(model.vocab_size)
    for together, count in batches(fitted, size):
        stations, laws = _stations(model, together)
        parts.append(np.asarray(stations)[:, :count].reshape(S, -1, model.width))
        law += np.asarray(laws[:count], np.float64).sum(0)
    places = jnp.asarray(np.concatenate(parts, axis=1))
    log_law = jnp.log(jnp.asarray(law / law.sum(), places.dtype))
    lenses = {"logit": LOGIT_LENS}
    if jacobians >= 8:
        at = np.random.default_rng(seed).integers(1, T, jacobians)
        lenses["jacobian"] = _jacobian(model, fitted[:jacobians], at)
    lenses["least_squares"] = _least_squares(places)
    if steps >= FEWEST_STEPS:
        lenses["tuned"] = _tuned(model, places, key, steps, batch)
    readings: dict[str, list[list[np.ndarray]]] = {name: [] for name in lenses}
    one_law = []
    for together, count in batches(others, size):
        stations, _ = _stations(model, together)
        for name, lens in lenses.items():
            readings[name].append([np.asarray(a, np.float64)[:count] for a in _read(model, lens, stations)])
        one_law.append(np.asarray(_against(model, log_law, stations[-1]), np.float64)[:count])
    joined = {name: [np.concatenate(a) for a in zip(*parts, strict=True)] for name, parts in readings.items()}
    return _Readings(lenses, {name: (kl, same) for name, (kl, same) in joined.items()}, np.concatenate(one_law))


_jacobian = jax.jit(jacobian_lens)
_least_squares = jax.jit(least_squares_lens)


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def _tuned(model: Transformer, places: Float[Array, "S N D"], key: Array, steps: int, batch: int) -> Lens:
    return tuned_lens(model, places, key=key, steps=steps, batch=batch)


@jax.jit
def _stations(model: Transformer, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "S B P D"], Float[Array, "B V"]]:
    """The stations of all positions but the first, and the final law summed over them."""
    walks = jax.vmap(model.walk)(tokens)
    laws = jax.nn.softmax(jax.vmap(jax.vmap(model.logits))(walks.context[:, 1:]))
    return walks.stations.swapaxes(0, 1)[:, :, 1:], laws.sum(1)


@jax.jit
def _read(
    model: Transformer, lens: Lens, stations: Float[Array, "S B P D"]
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    S, B, P, D = stations.shape
    reading = read(model, lens, stations.reshape(S, B * P, D))
    kl, agreement = (a.reshape(S, B, P).mean(-1).T for a in (reading.kl, 1.0 * (reading.rank == 0)))
    return kl, agreement


@jax.jit
def _against(model: Transformer, log_law: Float[Array, " V"], last: Float[Array, "B P D"]) -> Float[Array, " B"]:
    """KL(final || log_law), mean over positions."""
    final = jax.nn.log_softmax(jax.vmap(jax.vmap(lambda x: model.logits(model.context(x))))(last))
    p = jnp.exp(final)
    return jnp.where(p > 0, p * (final - log_law), 0).sum(-1).mean(-1)
