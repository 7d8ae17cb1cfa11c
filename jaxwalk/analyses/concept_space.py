"""C8: embeddings are concepts: token vectors of one category lie together, and directions are features.

Claim: Singh, arXiv 2308.10874. Categories are the world's own, where it has any; else English words, or characters
where tokens are bytes, of the file `concepts.json` beside this one, or of a file of its format:

    {"categories": {"animals": ["dog", "cat", "cow", ...], "colours": ["red", ...], ...},
     "analogies": {"plural": [["dog", "dogs", "cat", "cats"], ...], ...}}

Measures, of words by the cosine of their vectors: the share of the k nearest that are of the same category, the AUC
of pairs of one category against pairs of two, silhouette (Rousseeuw 1987), the held-out AUC of a concept's
direction (difference of means), and analogies by 3CosAdd (Levy and Goldberg 2014), whose inputs are no answers.

Each for four arrangements of the vectors: raw; mean-centred; without the mean and the top principal components (Mu
and Viswanath, 1702.01417); and whitened by the causal inner product (Park et al., 2311.03658).

Nulls: permuted labels; labels permuted among words of like frequency, since frequency alone arranges vectors; the
untrained model; random vectors; and for analogies the nearest token to c, without any offset (Linzen, 1606.07736).
The units are categories, since words of one category are not independent; words where there are few categories.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxwalk.analyses._concepts import Known, known_concepts
from jaxwalk.analyses._word_vectors import (
    MEASURES,
    Arrangement,
    Nearness,
    arrangements,
    principal_coordinates,
    solve,
    word_scores,
)
from jaxwalk.config import ConfigError
from jaxwalk.evidence.decision import FEWEST_UNITS, Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import permute_within, quantile_groups
from jaxwalk.evidence.subject import Subject

GROUPS = 10
"""The most groups of words of like frequency."""
COUNTED = 1 << 18
"""Tokens of the data in which frequencies are counted."""
DRAWS = 4
"""The number of draws of random vectors, whose scores are averaged."""
SHOWN = 6
"""Categories on the map: as many as colours are told apart."""
FEWEST_TO_DECIDE = 32
"""Words: with fewer, groups of like frequency are so wide that frequency passes for a concept."""
SMALLEST_PRECISION = 0.05
"""Half a word of the ten nearest: less is no arrangement by category that a reader of such a list would see."""
SMALLEST_AUC = 0.05
"""A direction with a smaller excess tells one word in twenty better than its null does."""
LABELS = {"centred": "mean-centred", "raw": "raw", "minus_top": "minus top", "whitened": "whitened"}
NULLS = {
    "untrained": "untrained model",
    "random": "random vectors",
    "permuted": "permuted labels",
    "frequency_matched": "labels permuted among words of like frequency",
}


def analyse(
    subject: Subject,
    *,
    concepts: str | os.PathLike[str] | None = None,
    k: int = 10,
    components: int = 1,
    ridge: float = 1e-3,
    words: int = 600,
    permutations: int = 99,
) -> Finding:
    """Whether vectors of one category lie together, and whether differences of means are features.

    Args:
        subject: the model and its data.
        concepts: a JSON file of categories and analogies to use instead of the world's or the shipped ones.
        k: of the nearest words, at most the smallest category less one.
        components: principal components that `minus_top` takes away.
        ridge: of the whitening, relative to the mean variance of a direction.
        words: the most that are measured.
        permutations: the number of each kind, whose scores are averaged.

    Raises:
        ConfigError: for a file that is not of the format, and for k or permutations below 1.
    """
    for option, value in {"k": k, "permutations": permutations}.items():
        if value < 1:
            raise ConfigError(f"{option}: expected at least 1, got {value}.")
    rng = np.random.default_rng(subject.seed)
    known = known_concepts(subject, concepts, words, rng)
    k = min(k, int(np.min(np.bincount(known.labels))) - 1)
    counts = _frequencies(subject)
    labels = _permuted_labels(known, counts, permutations, rng)
    choice = Choice(known, k, components, ridge)
    tied = subject.model.unembed.weight is None
    quantities, scored = _quantities(subject, choice, labels, rng, output=False)
    first = quantities if tied else quantities | _quantities(subject, choice, labels, rng, output=True)[0]
    arrays, figures = _figures(subject, known, quantities, scored["centred"], k)
    return Finding(
        name="concept_space",
        claim="C8: embeddings are concepts: nearness of token vectors is relatedness, and directions are features.",
        **numbers(first.values()),
        conventions=known.conventions | _conventions(subject, choice, counts, permutations, "whitened" in scored),
        arrays=arrays,
        figures=figures,
        primary=_primary(quantities),
    )


def _primary(quantities: Mapping[str, Quantity]) -> tuple[Contrast, ...]:
    """Words and directions against what would arrange them without concepts."""
    precision, direction = quantities["precision_centred"], quantities["direction_auc_centred"]
    near, along = "nearest words are of one category", "a concept has a direction that tells words it was not fitted on"
    W = len(np.asarray(precision.values))
    if W < FEWEST_TO_DECIDE:
        return (untestable("C8", near, precision.name, f"{W} words are known, and {FEWEST_TO_DECIDE} are needed"),)
    asked = [(precision, near, SMALLEST_PRECISION, [null for null in NULLS if null != "untrained"])]
    if "untrained" in precision.nulls:
        asked.append((precision, near, SMALLEST_PRECISION, ["untrained"]))
    asked.append((direction, along, SMALLEST_AUC, list(NULLS)))
    contrasts = []
    for quantity, statement, smallest, nulls in asked:
        null = max((null for null in nulls if null in quantity.nulls), key=quantity.references.__getitem__)
        contrasts.append(quantity.contrast(null, "C8", statement, at_least=smallest, label=NULLS[null]))
    return tuple(contrasts)


class Choice(NamedTuple):
    """What is measured of a table of vectors, and how.

    Attributes:
        known: the words.
        k: of the nearest words.
        components: principal components that `minus_top` takes away.
        ridge: of the whitening.
    """

    known: Known
    k: int
    components: int
    ridge: float


def _permuted_labels(
    known: Known, counts: Int[np.ndarray, " V"] | None, permutations: int, rng: np.random.Generator
) -> dict[str, list[Int[np.ndarray, " W"]]]:
    """By null, labels permuted over all words, and over those of like frequency where frequencies are known."""
    W = len(known.tokens)
    groups = {"permuted": np.zeros(W, int)}
    if counts is not None:
        groups["frequency_matched"] = quantile_groups(counts[known.tokens], max(1, min(GROUPS, W // 8)))
    return {
        null: [known.labels[permute_within(group, rng)] for _ in range(permutations)] for null, group in groups.items()
    }


def _quantities(
    subject: Subject,
    choice: Choice,
    labels: Mapping[str, list[Int[np.ndarray, " W"]]],
    rng: np.random.Generator,
    *,
    output: bool,
) -> tuple[dict[str, Quantity], dict[str, "Scores"]]:
    """Of token or output vectors: the quantities by name, such as "precision_raw", and the scores by arrangement."""
    known = choice.known
    own = _scores(*_tables(subject.model, output), choice)
    untrained = None if subject.untrained is None else _scores(*_tables(subject.untrained, output), choice)
    clusters, relations = (
        labels if labels.max(initial=-1) + 1 >= FEWEST_UNITS else None for labels in (known.labels, known.relation)
    )
    quantities = {}
    for arrangement, mine in own.items():
        nulls = {} if untrained is None else {"untrained": untrained[arrangement].words}
        if arrangement == "centred":
            nulls["random"] = _random_scores(subject, choice, rng)
            for null, permuted in labels.items():
                nulls[null] = np.mean([word_scores(mine.near, each) for each in permuted], axis=0)
        for m, measure in enumerate(MEASURES):
            key = f"{measure}_{arrangement}{'_output' * output}"
            others: dict[str, Any] = {null: words[:, m] for null, words in nulls.items()}
            quantities[key] = Quantity(key, mine.words[:, m], others, measure.replace("_", " "), documents=clusters)
        if len(known.analogies):
            key = f"analogy_{arrangement}{'_output' * output}"
            others = {"offset_left_out": mine.analogies[:, 1], "chance": 1 / (subject.model.vocab_size - 3)}
            others |= {} if untrained is None else {"untrained": untrained[arrangement].analogies[:, 0]}
            quantities[key] = Quantity(key, mine.analogies[:, 0], others, "share solved", documents=relations)
    return quantities, own


def _tables(model: Any, output: bool) -> tuple[Float[np.ndarray, "V D"], Float[np.ndarray, "V D"]]:
    """The token vectors, or the output vectors, and the output vectors."""
    U = np.asarray(model.output_vectors, np.float32)
    X = U if output else np.asarray(model.token_vectors, np.float32)
    if not (np.isfinite(X).all() and np.isfinite(U).all()):
        raise NotApplicable("token vectors: expected finite numbers, got NaN. Analyse an earlier step.")
    return X, U


def _random_scores(subject: Subject, choice: Choice, rng: np.random.Generator) -> Float[np.ndarray, "W 4"]:
    """The mean scores of several draws of as many Gaussian vectors, mean-centred."""
    shape, draws = (subject.model.vocab_size, subject.model.width), []
    for _ in range(DRAWS):
        X = rng.standard_normal(shape, np.float32)
        rows = Arrangement(X.mean(0, dtype=np.float64), None)(X[choice.known.tokens].astype(np.float64))
        draws.append(word_scores(Nearness.of(rows, choice.k), choice.known.labels))
    return np.mean(draws, axis=0)


class Scores(NamedTuple):
    """What one arrangement of one table of vectors shows.

    Attributes:
        near: the nearness of words.
        words: [W, 4], the MEASURES of each word.
        analogies: [Q, 2], 1 where it is solved, and where it is without the offset.
    """

    near: Nearness
    words: Float[np.ndarray, "W 4"]
    analogies: Float[np.ndarray, "Q 2"]


def _scores(X: Float[np.ndarray, "V D"], U: Float[np.ndarray, "V D"], choice: Choice) -> dict[str, Scores]:
    """The scores of each arrangement of X."""
    known, scored = choice.known, {}
    for name, arrangement in arrangements(X, U, choice.components, choice.ridge).items():
        near = Nearness.of(arrangement(X[known.tokens].astype(np.float64)), choice.k)
        solved = solve(known.analogies, X, arrangement).astype(float) if len(known.analogies) else np.zeros((0, 2))
        scored[name] = Scores(near, word_scores(near, known.labels), solved)
    return scored


def _figures(
    subject: Subject, known: Known, quantities: Mapping[str, Quantity], scores: "Scores", k: int
) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    sizes, near = np.bincount(known.labels), scores.near
    means = np.eye(len(sizes))[known.labels] / sizes
    pairs = means.T @ near.cosine @ means
    # A word's cosine with itself is 1 and says nothing: it is taken out of the mean of its category.
    np.fill_diagonal(pairs, (np.diag(pairs) * sizes**2 - sizes) / (sizes * (sizes - 1)))
    bars = {a: quantities[f"precision_{a}"] for a in LABELS if f"precision_{a}" in quantities}
    ends = np.array([bar.interval or (bar.value, bar.value) for bar in bars.values()])
    arrays = {
        "category": np.array(known.names),
        "tokens": known.tokens,
        "labels": known.labels,
        "measure": np.array(MEASURES),
        "word_scores": scores.words,
        "category_cosine": pairs,
        "category_precision": np.bincount(known.labels, scores.words[:, 0]) / sizes,
        "arrangement": np.array([LABELS[a] for a in bars]),
        "precision": np.array([bar.value for bar in bars.values()]),
        "precision_low": ends[:, 0],
        "precision_high": ends[:, 1],
    }
    series = [Series("this model", "precision", "arrangement", "bars", "precision_low", "precision_high")]
    for null in [null for null in NULLS if null in bars["centred"].nulls]:
        arrays[f"precision_{null}"] = np.array([bar.references.get(null, np.nan) for bar in bars.values()])
        series.append(Series(NULLS[null], f"precision_{null}", "arrangement", "bars", dashed=True))
    title = f"How many of the {k} nearest words are of the word's own category, by arrangement of the vectors"
    precision = Figure(
        "concept_precision", title, "arrangement of the token vectors", f"precision at {k}", tuple(series)
    )
    title = "Mean cosine between the words of two categories, mean-centred (on the diagonal: of two words of one)"
    cells = Series("cosine", "category_cosine", "category", style="heatmap", rows="category")
    cosine = Figure("category_cosine", title, "category", "category", (cells,))
    x, y = principal_coordinates(near.cosine, 2).T
    points = []
    for number, c in enumerate(np.argsort(-arrays["category_precision"], kind="stable")[:SHOWN]):
        of, at = known.labels == c, f"map_{number}"
        arrays[f"{at}_x"], arrays[f"{at}_y"] = x[of], y[of]
        arrays[f"{at}_words"] = np.array([subject.symbol(int(v)) for v in known.tokens[of]])
        points.append(Series(known.names[c], f"{at}_y", f"{at}_x", style="points", text=f"{at}_words"))
    title = f"Mean-centred vectors of words in the plane that shows most of all {len(known.tokens)}"
    title += "" if len(sizes) <= SHOWN else f"; the {SHOWN} categories with the highest precision"
    return arrays, (precision, cosine, Figure("concept_map", title, "", "", tuple(points), equal_aspect=True))


def _conventions(
    subject: Subject, choice: Choice, counts: Int[np.ndarray, " V"] | None, permutations: int, whitened: bool
) -> dict[str, Any]:
    known, model = choice.known, subject.model
    W, C = len(known.tokens), len(known.names)
    return {
        "k": f"{choice.k}: at most the smallest category less one; neighbours among the {W} words, not all tokens",
        "cosine": "every measure is of vectors arranged over the whole vocabulary, then scaled to length 1",
        "auc": "probability that a word of the same category is nearer than one of another; mean over words",
        "direction_auc": (
            "a concept's direction is the mean of its words minus the mean of all others, cross-validated; each "
            "held-out word is compared with the held-out words of other categories; 0.5 is chance"
        ),
        "minus_top": f"centred, and without the top {choice.components} principal component(s) of all token vectors",
        "whitened": (
            "centred, times the inverse square root of the covariance of the output vectors (uniform over tokens), "
            f"plus {choice.ridge:g} of its mean eigenvalue"
            if whitened
            else f"not measured: {model.vocab_size} output vectors are fewer than two for each of {model.width} "
            "dimensions, and whitening would put them all about equally far apart"
        ),
        "sides": "token vectors only, which are the output vectors too: tied"
        if model.unembed.weight is None
        else "token vectors; names that end in _output are of the output vectors",
        "permuted": f"labels permuted over words: mean of {permutations}; random: mean of {DRAWS} draws",
        "frequency_matched": (
            f"labels permuted within groups of words of like frequency in {int(counts.sum())} tokens of the data, in "
            f"which {int((counts[known.tokens] > 0).sum())} of the {W} occur"
            if counts is not None
            else f"not available: {subject.no_data}"
        ),
        "untrained": "its own vectors, arranged by their own mean and covariance"
        if subject.untrained is not None
        else "not available: this model has no step 0",
        "units": f"the {C} categories" if C >= FEWEST_UNITS else f"the {W} words, as {C} categories are too few",
    }


def _frequencies(subject: Subject) -> Int[np.ndarray, " V"] | None:
    """How often each token occurs in the data that the model is trained on; None where there is no data."""
    T, V = subject.length, subject.model.vocab_size
    if subject.world is not None:
        key = jax.random.fold_in(jax.random.key(subject.seed), 0xF4E9)
        tokens = np.asarray(subject.world.sample(key, max(64, COUNTED // 4 // T), T)).ravel()
    elif subject.store is not None:
        tokens, segments = subject.store.batch(subject.seed, 0, max(64, COUNTED // T), T, split="train")
        tokens = tokens[segments > 0]
    else:
        return None
    return np.bincount(tokens, minlength=V)
