"""C6: context vectors are composed by an encoding walk, a vector carried from station to station.

Claim: Singh, arXiv 2308.10874. Measures: the geometry of each position's walk (length, displacement, straightness,
turn angles, cosines, norms) and its logit lens (nostalgebraist 2020): the law that each station would give if it
were the last, as KL(final || lens), its entropy, and the rank in it of the token that the final law puts first. In the
metric of these laws (Fisher's) each step has a length, and beside it stands the divergence of the laws at its ends.

The lens of the last station is the final law by construction, and random steps come closer to their end, too. The claim
predicts more: the walk composes more than the first station holds, which is the current token, and whose best law is
known; and the station before the last step holds it already, as a walk is no single step. Straightness decides
nothing, as the claim does not say how a walk turns: in D dimensions random steps are orthogonal, which gives about
1/sqrt(steps). Position 0 is reported apart: an attention sink there has a norm that swamps every mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.decision import Check, Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import NGram, fit_ngrams
from jaxwalk.evidence.subject import Draw, Subject
from jaxwalk.model import Transformer
from jaxwalk.probes.lenses import read_steps

FLOATS = 1 << 24
"""How many probabilities the laws of one station may have: few places waste the output map."""
WORK = 5e11
"""Floating-point operations that the laws of all stations may take, as long as there are eight paths."""
ALONE = ("lens_kl", "straightness", "length", "norm_growth")
"""What is reported of position 0, too."""
DRAWS = 4
"""The number of random walks for each walk."""
UNTRAINED = 4
"""How many untrained models there are: one initialisation is one draw, and the best of them is the null."""
COMPOSED = 0.01
"""The least gain over the law of the current token that matters, in nats per token: a likelihood 1% higher."""
FITTED_TOKENS = 1 << 17
"""How many tokens the law of the current token is fitted on."""
SMOOTHING = 4.0


def analyse(
    subject: Subject,
    *,
    paths: int = 256,
    positions: int = 32,
    stations: Literal["steps", "blocks"] = "steps",
    embedding: bool = True,
    normalised: bool = False,
) -> Finding:
    """The shape of the encoding walks, and what each of their stations would predict.

    Args:
        subject: a model with a world or a text.
        paths: the most paths; fewer of a large vocabulary.
        positions: the most positions of a path that are measured, beside position 0; fewer of a large vocabulary.
        stations: those after every aggregate and filter step, or only those after whole layers.
        embedding: whether the first station is part of the walk.
        normalised: whether stations are scaled to length 1 before their geometry.

    Raises:
        NotApplicable: if the walk has no step, or there are no paths.
    """
    model = subject.model
    if stations not in ("steps", "blocks"):
        raise ValueError(f"stations: expected 'steps' or 'blocks', got {stations!r}.")
    every = np.arange(model.stations)[:: 1 if stations == "steps" else 2][0 if embedding else 1 :]
    if len(every) < 2:
        raise NotApplicable(f"the walk has {len(every)} stations, and so no step, in a model of {model.depth} layers")
    draw, at, reduced = _paths(subject, paths, positions, len(every))

    def shapes(model: Transformer) -> Shape:
        seeds = (np.arange(len(draw.tokens)) + 65536 * subject.seed).astype(np.uint32)
        shape = measure(_shape, model, draw.tokens, seeds, shared=(at, every, np.asarray(normalised)))
        return Shape(*(np.where(np.isinf(a), np.nan, a) for a in shape))

    measured = shapes(model)
    untrained = [shapes(fresh) for fresh in subject.untrained_models(1 if reduced else UNTRAINED)]
    losses = _losses(measured, untrained, subject, draw, at)
    first = next(iter(untrained), None)
    others = _quantities(measured, first, draw.documents, model.vocab_size)
    arrays, figures = _figures(measured, untrained, draw.documents, every, at, stations)
    last = Check("lens_kl_last_station", float(measured.kl[..., -1].max()), 1e-6, "the last station's lens is the law")
    return Finding(
        name="encoding_walk",
        claim="C6: context vectors are composed by an encoding walk, whose steps build up the law of what comes next.",
        **numbers([*losses.values(), *others.values()]),
        conventions=_conventions(stations, every, at, len(draw.tokens), normalised, len(untrained)),
        arrays=arrays,
        figures=figures,
        primary=_contrasts(losses, subject.world, draw.tokens, at, len(every)),
        checks=(last,),
    )


def _paths(subject: Subject, paths: int, positions: int, S: int) -> tuple[Draw, Int[np.ndarray, " P"], bool]:
    """The paths, the positions of each from 0 on, and whether these were reduced to save work."""
    model = subject.model
    if subject.length < 2:
        raise NotApplicable("paths have one token, and position 0 is no evidence")
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")
    draw = subject.draw(paths)
    n, T = draw.tokens.shape
    count = max(1, min(positions, FLOATS // (n * model.vocab_size), T - 1))
    chosen = np.linspace(1, T - 1, count)
    if count < min(positions, T - 1):  # few are not at the ends, where contexts are short and the next token is unknown
        chosen = np.arange(1, count + 1) * (T - 1) / (count + 1)
    at = np.unique(np.concatenate([[0], chosen.round()])).astype(np.int32)
    most = max(8, int(WORK / (4.0 * S * (count + 1) * model.vocab_size * model.width)))
    return Draw(draw.tokens[:most], draw.documents[:most]), at, most < n


class Shape(NamedTuple):
    """What is measured of the walks of a path: [P] each, or [P, stations], [P, steps] or [P, turns].

    Attributes:
        length, displacement, straightness, turn, cosine, norms: the geometry; infinite where it is undefined.
        random_straightness, random_turn: that of random walks of the same steps, mean over `DRAWS`.
        entropy, kl, rank: what the lens reads at each station.
        fisher, divergence: summed over steps.
        loss: [P, 3], -log p(next token) of the lens of the first station, the last but one, and the last; 0 where there
            is no next token.
    """

    length: Any
    displacement: Any
    straightness: Any
    turn: Any
    cosine: Any
    norms: Any
    random_straightness: Any
    random_turn: Any
    entropy: Any
    kl: Any
    rank: Any
    fisher: Any
    divergence: Any
    loss: Any


def _shape(
    model: Transformer,
    path: Int[Array, " T"],
    seed: Array,
    at: Int[Array, " P"],
    every: Int[Array, " S"],
    normalised: Array,
) -> Shape:
    """The walks of some positions of a path."""
    walks = model.walk(path).stations[every][:, at]
    reading, fisher, divergence = read_steps(model, walks)
    laws = jax.vmap(jax.vmap(lambda x: jax.nn.log_softmax(model.logits(model.context(x)))))(
        walks[np.array([0, -2, -1])]
    )
    loss = jnp.stack([-_next_log_prob(law, path, at) for law in laws], axis=-1)
    walks = walks.swapaxes(0, 1).astype(jnp.float32)

    def one(walk: Array, key: Array) -> tuple[Array, ...]:
        size = norms(walk)
        walk = walk / jnp.where(normalised, size[:, None], 1)
        nulls = jax.vmap(random_walk, (None, 0))(walk, jax.random.split(key, DRAWS))
        undefined = lambda a: jnp.where(jnp.isnan(a) & ~jnp.isnan(size).any(), jnp.inf, a)
        return (
            length(walk),
            displacement(walk),
            undefined(straightness(walk)),
            undefined(turn_angles(walk)),
            undefined(stationwise_cosine(walk)),
            size,
            undefined(jax.vmap(straightness)(nulls).mean(axis=0)),
            undefined(jax.vmap(turn_angles)(nulls).mean(axis=0)),
        )

    geometry = jax.vmap(one)(walks, jax.random.split(jax.random.key(seed), len(at)))
    lens = (*(a.T for a in reading), fisher.sum(0), divergence.sum(0))
    return Shape(*(*geometry, *lens, loss))


def _next_log_prob(log_laws: Float[Array, "P V"], path: Int[Array, " T"], at: Int[Array, " P"]) -> Array:
    """log p of the token after each position, [P]; 0 after the last one."""
    after = path[jnp.minimum(at + 1, len(path) - 1)]
    return jnp.where(at + 1 < len(path), jnp.take_along_axis(log_laws, after[:, None], axis=1)[:, 0], 0)


def _ngram_loss(ngram: NGram, path: Int[Array, " T"], at: Int[Array, " P"]) -> Array:
    """-log p of the token after each position, [P], of an n-gram model."""
    return -_next_log_prob(ngram(path)[at], path, at)


def _world_loss(world: Any, path: Int[Array, " T"], at: Int[Array, " P"]) -> Array:
    """-log p of the token after each position, [P], of the world."""
    return -_next_log_prob(world.next_log_probs(path)[1:][at], path, at)


# What is measured, and what it decides.


def _per_path(shape: Shape) -> dict[str, np.ndarray]:
    """Each number, [n]: the mean over positions without position 0, and some of position 0 alone."""
    every = {
        "lens_kl": shape.kl[..., :-1].mean(-1),
        "lens_kl_first": shape.kl[..., 0],
        "lens_kl_before_last": shape.kl[..., -2],
        "lens_top_agreement": (shape.rank[..., :-1] == 0).mean(-1),
        "entropy_change": shape.entropy[..., -1] - shape.entropy[..., 0],
        "straightness": shape.straightness,
        "length": shape.length,
        "displacement": shape.displacement,
        "cosine": _mean(shape.cosine, -1),
        "fisher_length": shape.fisher,
        "step_divergence": shape.divergence,
        "norm_growth": shape.norms[..., -1] / shape.norms[..., 0],
    }
    if shape.turn.shape[-1]:
        every["turn_angle"] = _mean(shape.turn, -1)
    alone = {f"{name}_position_0": every[name][:, 0] for name in ALONE}
    return {name: _mean(values[:, 1:], 1) for name, values in every.items()} | alone


UNITS = {"straightness": "of 1", "lens_top_agreement": "share", "turn_angle": "radians", "cosine": "of 1"}


def _scored(tokens: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Which of the positions are scored: all but position 0, and the last token, of which the next is not known."""
    return (at > 0) & (at < tokens.shape[1] - 1)


def _losses(
    shape: Shape, untrained: Sequence[Shape], subject: Subject, draw: Draw, at: Int[np.ndarray, " P"]
) -> dict[str, Quantity]:
    """The losses of the last station and of the one before, beside that of the law of the current token."""
    scored, T = _scored(draw.tokens, at), draw.tokens.shape[1]
    if not scored.any():
        return {}
    try:
        fitted = subject.draw(-(-FITTED_TOKENS // T), T, to_fit=True).tokens
    except NotApplicable:
        return {}
    ngram = fit_ngrams(fitted, np.ones_like(fitted), subject.model.vocab_size, 1, SMOOTHING)
    current = measure(_ngram_loss, ngram, draw.tokens, shared=(at,))[:, scored].mean(axis=1)
    loss, *others = (each.loss[:, scored].mean(axis=1) for each in (shape, *untrained))
    quantities = {}
    for name, station in {"loss": 2, "loss_before_last": 1}.items():
        nulls = {"current_token": current, "first_station": loss[:, 0]}
        if others:
            nulls["untrained"] = min((other[:, station] for other in others), key=np.mean)
        quantities[name] = Quantity(name, loss[:, station], nulls, documents=draw.documents)
    return quantities


def _quantities(shape: Shape, untrained: Shape | None, documents: np.ndarray, vocab_size: int) -> dict[str, Quantity]:
    """The numbers of `_per_path`."""
    null = {} if untrained is None else _per_path(untrained)
    extra: Mapping[str, dict[str, Any]] = {
        "straightness": {"random_walk": _mean(shape.random_straightness[:, 1:], 1)},
        "turn_angle": {"random_walk": _mean(_mean(shape.random_turn, -1)[:, 1:], 1)},
        "lens_top_agreement": {"chance": 1 / vocab_size},
    }
    quantities = {}
    for name, values in _per_path(shape).items():
        nulls = ({"untrained": null[name]} if name in null else {}) | extra.get(name, {})
        nulls = {key: a for key, a in nulls.items() if np.isfinite(a).all()}
        if np.isfinite(values).all():  # walks that stand still have no direction
            quantities[name] = Quantity(name, values, nulls, UNITS.get(name, "nats"), documents=documents)
    return quantities


def _contrasts(
    losses: Mapping[str, Quantity], world: Any, tokens: np.ndarray, at: np.ndarray, stations: int
) -> tuple[Contrast, ...]:
    """What the claim predicts of the last station and of the one before: they know more than the current token."""
    reason = ""
    if not losses:
        reason = "there are too few tokens to fit the law of the current token, or to predict"
    elif world is not None:
        ideal = measure(_world_loss, world, tokens, shared=(at,))[:, _scored(tokens, at)].mean()
        if losses["loss"].references["current_token"] - ideal < 2 * COMPOSED:
            reason = "in this world the current token tells nearly all about the next one"
    contrasts = []
    for name, station in {"loss": "the last station", "loss_before_last": "the station before the last step"}.items():
        statement = f"{station} predicts the next token better than the current token can, the first station"
        if reason or (name != "loss" and stations == 2):
            contrasts.append(untestable("C6", statement, name, reason or "the walk has one step"))
            continue
        null = min(losses[name].references, key=losses[name].references.__getitem__)
        label = {"current_token": "the law of the current token", "untrained": "the best untrained model"}.get(null)
        contrasts.append(losses[name].contrast(null, "C6", statement, at_most=-COMPOSED, label=label))
    return tuple(contrasts)


# Figures and conventions.


def _figures(
    shape: Shape, untrained: Sequence[Shape], documents: np.ndarray, every: np.ndarray, at: np.ndarray, stations: str
) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    """Arrays and figures by station."""
    arrays: dict[str, np.ndarray] = {"station": every, "turn_station": every[1:-1], "positions": at}
    for what, source in {"lens_entropy": "entropy", "lens_rank": "rank", "cosine": "cosine"}.items():
        arrays[what] = _mean(getattr(shape, source)[:, 1:], (0, 1))

    def lines(what: str, source: str, x: str) -> tuple[Series, ...]:
        values = getattr(shape, source)
        per_path = _mean(values[:, 1:], 1)
        arrays[what] = _mean(per_path, 0)
        ends = [Quantity(what, column, documents=documents).interval for column in per_path.T]
        drawn = Series("trained", what, x)
        if None not in ends:
            arrays[f"{what}_low"], arrays[f"{what}_high"] = np.array(ends).T
            drawn = Series("trained", what, x, low=f"{what}_low", high=f"{what}_high")
        arrays[f"{what}_position_0"] = _mean(values[:, 0], 0)
        series = [drawn]
        if untrained:
            arrays[f"{what}_untrained"] = _mean(getattr(untrained[0], source)[:, 1:], (0, 1))
            series.append(Series("untrained", f"{what}_untrained", x, dashed=True))
        return (*series, Series("position 0", f"{what}_position_0", x, dashed=True))

    x_label = f"station of the encoding walk ({'after every step' if stations == 'steps' else 'after every layer'})"
    kl_title = "How far the law of each station, read as if it were the last, is from the final law"
    kl = Figure("lens_kl_by_station", kl_title, x_label, "KL(final || lens), nats", lines("lens_kl", "kl", "station"))
    size_title, series = "Length of the carried vector at each station", lines("norms", "norms", "station")
    size = Figure("norms_by_station", size_title, x_label, "norm", series, log_y=True)
    if len(every) == 2:
        return arrays, (kl, size)
    arrays["turn_random"] = _mean(shape.random_turn[:, 1:], (0, 1))
    random = Series("random directions", "turn_random", "turn_station", dashed=True)
    turns = Figure(
        "turn_angle_by_station",
        "How sharply the walk turns at each station (0: straight on, π: back)",
        x_label,
        "turn angle, radians",
        (*lines("turn", "turn", "turn_station"), random),
        references={"right angle": float(np.pi / 2)},
    )
    return arrays, (kl, turns, size)


def _conventions(
    stations: str, every: np.ndarray, at: np.ndarray, n: int, normalised: bool, untrained: int
) -> dict[str, Any]:
    return {
        "stations": f"{stations}: numbers {', '.join(map(str, every))}; 0 is the embedding, odd ones follow aggregates",
        "normalised": "stations scaled to length 1 before geometry" if normalised else "stations as they are",
        "final_norm": "geometry before it; the lens applies it, and the output map, to every station",
        "paths": n,
        "positions": f"{', '.join(map(str, at))}; position 0 is reported apart, and in no mean",
        "units": "nats; radians; lengths in the units of the stream; Fisher lengths in sqrt(nats)",
        "turn_angle": "between consecutive steps, 0 straight on, pi back; undefined, and left out, at a zero step",
        "loss": "-log p(next token) of the last station; loss_before_last: of the lens of the station before",
        "current_token": f"law of the next token given the current one, fitted on at most {FITTED_TOKENS} other tokens",
        "lens_kl": "KL(final || lens), mean over all stations but the last, where it is 0 exactly",
        "lens_top_agreement": "share of stations but the last whose most probable token is the final law's",
        "fisher_length": "summed: sqrt(delta' G delta) of each step, G the Fisher metric where it starts",
        "step_divergence": "summed over steps: KL(law of a station || law of the next)",
        "entropy_change": "entropy of the final law minus that of the first station's lens",
        "random_walk": f"same start, same step lengths, independent uniform directions; mean of {DRAWS} for each walk",
        "untrained": f"of loss and loss_before_last the best of {untrained}, otherwise the first"
        if untrained
        else "none",
    }


# Geometry of one walk.


def norms(walk: Float[Array, "S D"]) -> Float[Array, " S"]:
    """The length of the vector at each station."""
    return jnp.linalg.norm(walk, axis=-1)


def length(walk: Float[Array, "S D"]) -> Float[Array, ""]:
    """Summed length of the steps."""
    return norms(jnp.diff(walk, axis=0)).sum()


def displacement(walk: Float[Array, "S D"]) -> Float[Array, ""]:
    """Distance from the first station to the last."""
    return jnp.linalg.norm(walk[-1] - walk[0])


def straightness(walk: Float[Array, "S D"]) -> Float[Array, ""]:
    """Displacement over length: 1 on a straight line, NaN for a walk that does not move."""
    total = length(walk)
    return jnp.where(total > 0, displacement(walk) / jnp.where(total > 0, total, 1), jnp.nan)


def turn_angles(walk: Float[Array, "S D"]) -> Float[Array, " turns"]:
    """Angle between consecutive steps, [S-2] radians: 0 straight on, pi back, NaN beside a step of zero.

    In the form 2 atan2(|a - b|, |a + b|) of unit vectors (Kahan), accurate at both ends, where arccos is not.
    """
    steps = jnp.diff(walk, axis=0)
    size = norms(steps)[:, None]
    unit = steps / jnp.where(size > 0, size, 1)
    a, b = unit[:-1], unit[1:]
    angle = 2 * jnp.arctan2(norms(a - b), norms(a + b))
    return jnp.where((size[:-1, 0] > 0) & (size[1:, 0] > 0), angle, jnp.nan)


def stationwise_cosine(walk: Float[Array, "S D"]) -> Float[Array, " steps"]:
    """Cosine of each station with the next, [S-1]; NaN beside a station of zero."""
    size = norms(walk)
    product = size[:-1] * size[1:]
    return jnp.where(product > 0, (walk[:-1] * walk[1:]).sum(-1) / jnp.where(product > 0, product, 1), jnp.nan)


def random_walk(walk: Float[Array, "S D"], key: Array) -> Float[Array, "S D"]:
    """A walk with the same start and step lengths as `walk`, each step in a direction uniform on the sphere."""
    steps = jnp.diff(walk, axis=0)
    direction = jax.random.normal(key, steps.shape, steps.dtype)
    direction = direction / norms(direction)[:, None]
    return jnp.concatenate([walk[:1], walk[0] + jnp.cumsum(norms(steps)[:, None] * direction, axis=0)])


def _mean(values: np.ndarray, axis: Any) -> np.ndarray:
    """Mean of the numbers that are defined; NaN where none is."""
    defined = np.isfinite(values)
    count = defined.sum(axis)
    return np.where(count > 0, np.where(defined, values, 0).sum(axis) / np.maximum(count, 1), np.nan)
