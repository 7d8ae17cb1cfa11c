"""C6: context vectors are composed by an encoding walk, a vector carried from station to station.

Claim: Singh, arXiv 2308.10874. Measures: the geometry of each position's walk (length, displacement, straightness,
turn angles, cosines, norms) and its logit lens (nostalgebraist 2020): the law that each station would give if it
were the last, as KL(final || lens), its entropy, and the rank in it of the token that the final law puts first. In the
metric of these laws (Fisher's) each step has a length, and beside it stands the divergence of the laws at its ends.

Nulls: the untrained model, and a random walk with the same step lengths and random directions: in D dimensions
random steps are orthogonal, so that a straightness of about 1/sqrt(steps) and a turn of pi/2 show nothing. Position
0 is reported apart: an attention sink there has a norm that swamps every mean.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import batches, mean_interval
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.probes.lenses import read_steps

FLOATS = 1 << 24
"""How many numbers of one station's laws, or of all stations, a batch may hold: few places waste the output map."""

WORK = 5e11
"""Floating-point operations that the laws of all stations may take, as long as there are eight paths."""

ALONE = ("lens_kl", "straightness", "length", "norm_growth")
"""What is reported of position 0, too."""


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

    positions: the most positions of a path that are measured, beside position 0; these, and paths, are fewer of a large
    vocabulary.
    stations: those after every aggregate and filter step, or only those after whole layers. embedding: whether the
    first station is part of the walk. normalised: whether stations are scaled to length 1 before their geometry.
    """
    model = subject.model
    if stations not in ("steps", "blocks"):
        raise ValueError(f"stations: expected 'steps' or 'blocks', got {stations!r}.")
    every = np.arange(2 * model.depth + 1)[:: 1 if stations == "steps" else 2][0 if embedding else 1 :]
    S = len(every)
    if S < 2:
        raise NotApplicable(f"the walk has {S} stations, and so no step, in a model of {model.depth} layers")
    if subject.length < 2:
        raise NotApplicable("paths have one token, and position 0 is no evidence")
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")

    tokens = subject.paths(paths)
    positions = max(1, min(positions, FLOATS // (len(tokens) * model.vocab_size)))
    tokens = tokens[: max(8, int(WORK / (4.0 * S * (positions + 1) * model.vocab_size * model.width)))]
    T = tokens.shape[1]
    chosen = np.unique(np.linspace(1, T - 1, min(positions, T - 1)).round().astype(int))
    at = np.concatenate([[0], chosen])
    size = FLOATS // max(len(at) * model.vocab_size, (2 * model.depth + 1) * T * model.width)
    size = max(1, min(128, len(tokens), size))

    def observed(model: Transformer) -> Shape:
        parts = []
        for number, (batch, count) in enumerate(batches(tokens, size)):
            key = jax.random.fold_in(jax.random.key(subject.seed), number)
            shape = _observe(model, batch, at, key, every=tuple(every.tolist()), normalised=normalised)
            parts.append(Shape(*(np.asarray(a, float)[:count] for a in shape)))
        return Shape(*(np.concatenate(a) for a in zip(*parts, strict=True)))

    seen = {"": observed(model)}
    if not np.isfinite(seen[""].norms).all():
        raise NotApplicable("stations: expected finite numbers, got NaN. Analyse an earlier step.")
    if subject.untrained is not None:
        seen["untrained"] = observed(subject.untrained)

    def numbers(shape: Shape) -> dict[str, np.ndarray]:
        """name -> [paths, positions], position 0 first."""
        found = {
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
        if S > 2:
            found["turn_angle"] = _mean(shape.turn, -1)
        return found

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}

    def apart(shape: Shape) -> dict[str, np.ndarray]:
        """name -> [paths]: means over positions without position 0, and some of position 0 alone."""
        found = numbers(shape)
        alone = {f"{name}_position_0": found[name][:, 0] for name in ALONE}
        return {name: _mean(values[:, 1:], 1) for name, values in found.items()} | alone

    for name, per_path in apart(seen[""]).items():
        if not np.isfinite(per_path).all():  # walks that stand still have no direction
            continue
        measured[name] = float(per_path.mean())
        low, high = mean_interval(per_path, subject.seed)
        interval[name] = (float(low), float(high))
    if "untrained" in seen:
        for name, per_path in apart(seen["untrained"]).items():
            if name in measured:
                null[f"{name}.untrained"] = float(_mean(per_path, None))
    null["straightness.random_walk"] = float(_mean(seen[""].random_straightness[:, 1:], None))
    if "turn_angle" in measured:
        null["turn_angle.random_walk"] = float(_mean(seen[""].random_turn[:, 1:], None))
    null["lens_kl.last_station"] = float(seen[""].kl[..., -1].max())
    null["lens_top_agreement.chance"] = 1 / model.vocab_size

    arrays: dict[str, np.ndarray] = {"station": every, "turn_station": every[1:-1], "positions": at}

    def lines(what: str, source: str, x: str) -> tuple[Series, ...]:
        values = getattr(seen[""], source)
        per_path = _mean(values[:, 1:], 1)
        arrays[what] = _mean(per_path, 0)
        drawn = Series("trained", what, x)
        if np.isfinite(per_path).all():
            arrays[f"{what}_low"], arrays[f"{what}_high"] = mean_interval(per_path, subject.seed)
            drawn = Series("trained", what, x, low=f"{what}_low", high=f"{what}_high")
        arrays[f"{what}_position_0"] = _mean(values[:, 0], 0)
        series = [drawn]
        if "untrained" in seen:
            arrays[f"{what}_untrained"] = _mean(getattr(seen["untrained"], source)[:, 1:], (0, 1))
            series.append(Series("untrained", f"{what}_untrained", x, dashed=True))
        return (*series, Series("position 0", f"{what}_position_0", x, dashed=True))

    station = f"station of the encoding walk ({'after every step' if stations == 'steps' else 'after every layer'})"
    figures = [
        Figure(
            "lens_kl_by_station",
            "How far the law of each station, read as if it were the last, is from the final law",
            station,
            "KL(final || lens), nats",
            lines("lens_kl", "kl", "station"),
        ),
        Figure(
            "norms_by_station",
            "Length of the carried vector at each station",
            station,
            "norm",
            lines("norms", "norms", "station"),
            log_y=True,
        ),
    ]
    if S > 2:
        turns = lines("turn", "turn", "turn_station")
        arrays["turn_random"] = _mean(seen[""].random_turn[:, 1:], (0, 1))
        figures.insert(
            1,
            Figure(
                "turn_angle_by_station",
                "How sharply the walk turns at each station (0: straight on, π: back)",
                station,
                "turn angle, radians",
                (*turns, Series("random directions", "turn_random", "turn_station", dashed=True)),
                references={"right angle": float(np.pi / 2)},
            ),
        )
    arrays["lens_entropy"] = _mean(seen[""].entropy[:, 1:], (0, 1))
    arrays["lens_rank"] = _mean(seen[""].rank[:, 1:], (0, 1))
    arrays["cosine"] = _mean(seen[""].cosine[:, 1:], (0, 1))

    conventions: dict[str, Any] = {
        "stations": f"{stations}: numbers {', '.join(map(str, every))} of 0 to {2 * model.depth}",
        "embedding": "the first station" if embedding else "left out",
        "normalised": "stations scaled to length 1 before geometry" if normalised else "stations as they are",
        "final_norm": "geometry before it; the lens applies it, and the output map, to every station",
        "position_0": "left out of every mean, and reported apart as name_position_0",
        "positions": f"{len(chosen)} of positions 1 to {T - 1}, evenly spaced, from 0; mean over positions, then paths",
        "units": "nats; radians; lengths in the units of the stream",
        "turn_angle": "between consecutive steps, 0 straight on, pi back; undefined, and left out, at a zero step",
        "cosine": "of consecutive stations",
        "lens_kl": "KL(final || lens), mean over all stations but the last, where it is 0 exactly",
        "lens_top_agreement": "share of stations but the last whose most probable token is the final law's",
        "fisher_length": "summed: sqrt(delta' G delta) of each step, G the Fisher metric where it starts; sqrt(nats)",
        "step_divergence": "summed over steps: KL(law of a station || law of the next), nats; half the squared Fisher "
        "length where steps are small",
        "entropy_change": "entropy of the final law minus that of the first station's lens",
        "random_walk": "same start, same step lengths, independent directions, uniform on the sphere",
        "nulls": "of the measured number before the dot",
        "intervals": "95%, bootstrap over paths",
        "paths": len(tokens),
    }
    if subject.untrained is None:
        conventions["untrained"] = "not available: this model has no step 0"
    beside = f", {null['lens_kl.untrained']:.3f} untrained" if "untrained" in seen else ""
    straight = f", {null['straightness.untrained']:.3f} untrained" if "untrained" in seen else ""
    shape_said = (
        f"Walks of {S - 1} steps have straightness {measured['straightness']:.3f} "
        f"[{interval['straightness'][0]:.3f}, {interval['straightness'][1]:.3f}] (random directions "
        f"{null['straightness.random_walk']:.3f}{straight}); "
        if "straightness" in measured
        else ""
    )
    each = "their stations" if shape_said else "Stations"
    return Finding(
        name="encoding_walk",
        claim="C6: context vectors are composed by an encoding walk, whose steps build up the law of what comes next.",
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=tuple(figures),
        verdict=(
            f"{shape_said}{each}, read as if they were the last, are {measured['lens_kl']:.3f} "
            f"[{interval['lens_kl'][0]:.3f}, {interval['lens_kl'][1]:.3f}] nat from the final law on average{beside}, "
            f"from {measured['lens_kl_first']:.3f} at the first station to {measured['lens_kl_before_last']:.3f} at "
            "the last but one."
        ),
    )


class Shape(NamedTuple):
    """What is kept of the walks of a batch of paths, [B, P] or [B, P, stations]."""

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


@functools.partial(jax.jit, static_argnames=("every", "normalised"))
def _observe(
    model: Transformer,
    tokens: Int[Array, "B T"],
    at: Int[Array, " P"],
    key: Array,
    *,
    every: tuple[int, ...],
    normalised: bool,
) -> Shape:
    walks = jax.vmap(lambda path: model.walk(path).stations)(tokens)[:, np.array(every)][:, :, at]  # [B, S, P, D]
    laws, *steps = read_steps(model, walks.swapaxes(0, 1).reshape(len(every), -1, walks.shape[-1]))
    entropy, kl, rank = (a.T.reshape(len(tokens), len(at), len(every)) for a in laws)
    fisher, divergence = (a.sum(0).reshape(len(tokens), len(at)) for a in steps)
    walks = walks.swapaxes(1, 2).astype(jnp.float32)
    keys = jax.random.split(key, tokens.shape[0] * len(at)).reshape(len(tokens), len(at))

    def one(walk: Array, key: Array) -> tuple[Array, ...]:
        size = norms(walk)
        walk = walk / size[:, None] if normalised else walk
        null = random_walk(walk, key)
        return (
            length(walk),
            displacement(walk),
            straightness(walk),
            turn_angles(walk),
            stationwise_cosine(walk),
            size,
            straightness(null),
            turn_angles(null),
        )

    return Shape(*(*jax.vmap(jax.vmap(one))(walks, keys), entropy, kl, rank, fisher, divergence))


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
