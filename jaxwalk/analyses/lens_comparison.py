"""C6: each step of the encoding walk builds up the final law, so every station should already hold part of it.

What a station holds depends on the lens it is read through (`jaxwalk.probes`): the identity, the mean Jacobian of the
last station, the least-squares map, or the map tuned to give the final law. Each is fitted on some paths and scored on
others, by KL(final || lens) at each station. That an affine map finds something at a station does not mean that the
model uses it.

Nulls: the lenses of the untrained model, fitted in the same way; and one law for all contexts, the mean of the final
laws, which a map can give that ignores its station.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence import engine
from jaxwalk.evidence.decision import Check, Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import mean_interval
from jaxwalk.evidence.subject import Draw, Subject
from jaxwalk.model import Transformer
from jaxwalk.probes.lenses import LOGIT_LENS, Lens, jacobian_lens, least_squares_lens, read, tuned_lens

LABELS = {
    "logit": "logit lens",
    "jacobian": "Jacobian lens",
    "least_squares": "least-squares lens",
    "tuned": "tuned lens",
}
PLACES = 1 << 25
"""The most numbers of stations that are held."""
FEWEST_STEPS = 50
"""Of the tuned lens's training. After fewer it is near the identity, where it starts."""
SMALLEST_SHARE = 0.15
"""The smallest difference of shares that matters: shares of untrained models of one architecture differ by 0.1."""
LEAST_CONTEXT = 0.01
"""In nats: if contexts change the final law by less, there is nothing for stations to hold a share of."""
ROUNDING = 1e-5
"""In nats: the same for the untrained model, whose law need only depend on its contexts by more than rounding."""
STATEMENT = "stations hold a larger share of what the final law says of its context than those of an untrained model"


class Cost(NamedTuple):
    """What fitting and reading may take.

    Attributes:
        jacobians: the number of derivatives that the Jacobian lens is the mean of.
        steps, batch: of the tuned lens's training.
    """

    jacobians: int
    steps: int
    batch: int


class Reading(NamedTuple):
    """The lenses of one model, and what they read on paths that they were not fitted on.

    Attributes:
        lenses: by name.
        kl: of each lens, KL(final || lens), mean over positions, [n, S].
        agreement: of each lens, whether its most probable token is the final law's, mean over positions, [n, S].
        one_law: KL(final || mean final law of the paths that were fitted on), [n].
        best: the lens with the least KL on the paths that it was fitted on.
    """

    lenses: dict[str, Lens]
    kl: dict[str, np.ndarray]
    agreement: dict[str, np.ndarray]
    one_law: np.ndarray
    best: str

    def columns(self, name: str) -> Float[np.ndarray, "n 2"]:
        """For each path, KL(final || lens), mean over stations but the last, and KL(final || one law)."""
        return np.stack([self.kl[name][:, :-1].mean(1), self.one_law], axis=1)


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
    """The four lenses, fitted on `paths` paths and scored on as many others.

    Args:
        subject: the model and its data.
        paths: the number of paths.
        jacobians: the number of derivatives that the Jacobian lens is the mean of.
        steps, batch: of the tuned lens's training.
        length: the most positions of a path. Position 0 is left out.
        work: about the most floating-point operations that the derivatives take. Training takes at most ten times as
            many, reading by a lens half as many. If a model is large there are fewer derivatives, steps and paths, and
            a lens that gets too few is left out.

    Raises:
        NotApplicable: if the model has no layers, or there are no paths of two tokens.
    """
    model, S = subject.model, subject.model.stations
    if S < 2:
        raise NotApplicable("the model has no layers, and so one station only, which every lens reads alike")
    T = min(length, subject.length)
    if T < 2:
        raise NotApplicable("paths have one token, and position 0 is no evidence")
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths: {subject.no_data}")
    paths = max(8, min(paths, PLACES // (2 * S * (T - 1) * model.width)))
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    of_law = 2.0 * model.vocab_size * model.width
    readable = max(8, int(0.5 * work / (S * (T - 1) * of_law)))
    to_fit = subject.draw(paths, T, to_fit=True).tokens
    draw = subject.draw(min(paths, readable), T)
    cost = Cost(
        jacobians=min(jacobians, len(to_fit), int(work / (6.0 * weights * T * model.width))),
        steps=min(steps, int(10 * work / (4.0 * (S - 1) * batch * of_law))),
        batch=batch,
    )
    models = {"": model} | ({} if subject.untrained is None else {"untrained": subject.untrained})
    readings = {who: fit_and_read(m, to_fit, draw.tokens, cost, subject.seed) for who, m in models.items()}
    shares, quantities = _quantities(readings, draw, model.vocab_size)
    arrays, figure = _picture(readings)
    best = readings[""].best
    at_last = max(float(kl[:, -1].max()) for kl in readings[""].kl.values())
    return Finding(
        name="lens_comparison",
        claim="C6: context vectors are composed station by station, and each station already holds part of the law.",
        **numbers([shares[best], *(q for name, q in shares.items() if name != best), *quantities]),
        conventions=_conventions(readings, cost, len(to_fit), draw),
        arrays=arrays,
        figures=(figure,),
        primary=(_contrast(readings, shares[best]),),
        checks=(Check("kl_last_station", at_last, 1e-5, "every lens reads the last station as the model does"),),
    )


def fit_and_read(
    model: Transformer, to_fit: Int[np.ndarray, "n T"], paths: Int[np.ndarray, "m T"], cost: Cost, seed: int
) -> Reading:
    """The lenses of a model, fitted on some paths and read on others."""
    stations, laws = engine.measure(stations_of_path, model, to_fit)
    S, D = model.stations, model.width
    places = jnp.asarray(stations.swapaxes(0, 1).reshape(S, -1, D), model.embed.table.dtype)
    law = laws.mean(axis=0)
    log_law = jnp.log(jnp.asarray(law / law.sum(), places.dtype))
    with jax.default_matmul_precision(engine.PRECISION):
        lenses = {"logit": LOGIT_LENS}
        if cost.jacobians >= 8:
            at = np.random.default_rng(seed).integers(1, to_fit.shape[1], cost.jacobians)
            lenses["jacobian"] = jacobian_lens(model, to_fit[: cost.jacobians], at)
        lenses["least_squares"] = least_squares_lens(places)
        if cost.steps >= FEWEST_STEPS:
            key = jax.random.fold_in(jax.random.key(seed), 0x1E45)
            lenses["tuned"] = tuned_lens(model, places, key=key, steps=cost.steps, batch=cost.batch)
    on_fitted, _ = engine.measure(read_path, model, to_fit[: len(paths)], shared=(lenses, log_law))
    on_others, one_law = engine.measure(read_path, model, paths, shared=(lenses, log_law))
    kl, agreement = ({name: pair[i] for name, pair in on_others.items()} for i in (0, 1))
    return Reading(lenses, kl, agreement, one_law, min(lenses, key=lambda name: on_fitted[name][0][:, :-1].mean()))


def stations_of_path(model: Transformer, path: Int[Array, " T"]) -> tuple[Float[Array, "S P D"], Float[Array, " V"]]:
    """The stations of all positions but the first, and the mean of their final laws."""
    walk = model.walk(path)
    return walk.stations[:, 1:], jax.nn.softmax(jax.vmap(model.logits)(walk.context[1:])).mean(0)


def read_path(
    model: Transformer, path: Int[Array, " T"], lenses: Mapping[str, Lens], log_law: Float[Array, " V"]
) -> tuple[dict[str, tuple[Array, Array]], Array]:
    """What lenses read on a path, means over its positions but the first.

    Returns:
        Of each lens, KL(final || lens) and whether its most probable token is the final law's, [S] each; and KL(final
        || log_law), [].
    """
    walk = model.walk(path)
    stations = walk.stations[:, 1:]
    final = jax.nn.log_softmax(jax.vmap(model.logits)(walk.context[1:]))
    one_law = jnp.where(final > -jnp.inf, jnp.exp(final) * (final - log_law), 0).sum(-1).mean()
    readings = {name: read(model, lens, stations) for name, lens in lenses.items()}
    return {name: (r.kl.mean(-1), (1.0 * (r.rank == 0)).mean(-1)) for name, r in readings.items()}, one_law


def share(means: Float[np.ndarray, "... 2"]) -> Any:
    """1 - KL(final || lens) / KL(final || one law), of the means of both."""
    return 1 - means[..., 0] / means[..., 1]


def _quantities(readings: Mapping[str, Reading], draw: Draw, V: int) -> tuple[dict[str, Quantity], list[Quantity]]:
    """The share of each lens, where there is something to hold a share of; and KL and agreement."""
    main, documents = readings[""], draw.documents
    null = readings.get("untrained")
    shares, others = {}, []
    for name in main.lenses:
        columns = {who: reading.columns(name) for who, reading in readings.items()}
        nulls: dict[str, Any] = {"one_law": 0.0} | ({} if null is None else {"untrained": columns["untrained"]})
        if null is not None and name == main.best:
            nulls["untrained"] = null.columns(null.best)
        shares[name] = Quantity(f"share_{name}", columns[""], nulls, "share of the KL", share, documents)
    for what, unit in (("kl", "nats"), ("agreement", "share of positions")):
        for name in main.lenses:
            per_path = {who: getattr(r, what)[name][:, :-1].mean(1) for who, r in readings.items()}
            nulls = {"one_law": main.one_law} if what == "kl" else {"chance": 1 / V}
            nulls |= {who: values for who, values in per_path.items() if who}
            others.append(Quantity(f"{what}_{name}", per_path[""], nulls, unit, documents=documents))
    return shares, others


def _contrast(readings: Mapping[str, Reading], shared: Quantity) -> Contrast:
    """The share of the best lens against that of the untrained model's best lens."""
    context = Quantity("context", readings[""].one_law, documents=shared.documents)
    low = context.value if context.interval is None else context.interval[0]
    reason = ""
    if low < LEAST_CONTEXT:
        reason = f"the final law depends on its context by {context.value:.2g} nats only, and a share of that is noise"
    elif "untrained" not in readings:
        reason = "there is no untrained model"
    elif readings["untrained"].one_law.mean() < ROUNDING:
        reason = "the law of the untrained model does not depend on its context"
    if reason:
        return untestable("C6", STATEMENT, shared.name, reason)
    return shared.contrast("untrained", "C6", STATEMENT, at_least=SMALLEST_SHARE, label="untrained")


def _picture(readings: Mapping[str, Reading]) -> tuple[dict[str, np.ndarray], Figure]:
    main = readings[""]
    arrays: dict[str, np.ndarray] = {"station": np.arange(next(iter(main.kl.values())).shape[1])}
    series = []
    for name, lens in main.lenses.items():
        key = f"kl_{name}"
        arrays[key] = main.kl[name].mean(0)
        arrays[f"{key}_low"], arrays[f"{key}_high"] = mean_interval(main.kl[name])
        series.append(Series(LABELS[name], key, "station", low=f"{key}_low", high=f"{key}_high"))
        if lens.weight is not None and lens.bias is not None:
            arrays |= {f"{name}_weight": np.asarray(lens.weight), f"{name}_bias": np.asarray(lens.bias)}
    if "untrained" in readings:
        arrays |= {f"kl_{name}_untrained": kl.mean(0) for name, kl in readings["untrained"].kl.items()}
        for name in ("logit", readings["untrained"].best):
            series.append(Series(f"{LABELS[name]}, untrained", f"kl_{name}_untrained", "station", dashed=True))
    return arrays, Figure(
        "lenses",
        "How far the law of each station is from the final law, by the lens it is read through",
        "station of the encoding walk (after every step)",
        "KL(final || lens), nats",
        tuple(series),
        references={"one law for all contexts": float(main.one_law.mean())},
    )


def _conventions(readings: Mapping[str, Reading], cost: Cost, fitted: int, draw: Draw) -> dict[str, Any]:
    lenses = readings[""].lenses
    return {
        "kl": "KL(final || lens), mean over stations but the last (where it is 0 exactly), positions, paths; nats",
        "share": "1 - kl / KL(final || one law for all contexts), of means over paths",
        "agreement": "share of positions, at stations but the last, whose most probable token is the final law's",
        "best": "the lens with the least KL on the paths that it was fitted on, of each model by itself: "
        + ", ".join(f"{LABELS[r.best]} ({who or 'this model'})" for who, r in readings.items()),
        "jacobian": f"of {cost.jacobians} paths, one position each" if "jacobian" in lenses else "left out: too costly",
        "tuned": f"{cost.steps} steps of {cost.batch} places" if "tuned" in lenses else "left out: too costly",
        "fitted": f"on {fitted} paths, scored on {len(draw.tokens)} others of {draw.tokens.shape[1]} tokens; position "
        "0 left out",
        "one_law": "the mean of the final laws on the paths that were fitted on, for every context",
        "untrained": "its own lenses, fitted in the same way, against its own final law",
        "saved": "the fitted maps are in the arrays, as NAME_weight [S-1, D, D] and NAME_bias [S-1, D]: jaxwalk.Lens",
    }
