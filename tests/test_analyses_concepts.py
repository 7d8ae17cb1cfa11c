"""Nearness of contexts and tokens, concepts in token vectors, co-occurrence: by hand, planted, counted, permuted."""

import collections
import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import (
    Finding,
    NotApplicable,
    Subject,
    _concepts,
    _rotation,
    _word_vectors,
    co_occurrence,
    concept_space,
    proximity,
)
from jaxwalk.config import ConfigError, TextData
from jaxwalk.evidence import statistics
from jaxwalk.evidence.decision import Quantity
from jaxwalk.filters import Embed, Linear, Unembed
from jaxwalk.paths import next_log_probs
from jaxwalk.text import ByteVocabulary, SymbolVocabulary, open_store
from tests.conftest import Uniform, model_of, quick, to64


def holds(finding, *measured):
    """What every finding promises."""
    assert isinstance(finding, Finding)
    json.dumps(finding.to_dict(), allow_nan=False)
    assert set(measured) <= set(finding.measured)
    assert all(np.isfinite(v) for v in finding.measured.values())
    assert all(np.isfinite(v) for v in finding.null.values())
    for name, (low, high) in finding.interval.items():
        assert low <= finding.measured[name] + 1e-9, name
        assert finding.measured[name] <= high + 1e-9, name
    assert all(check.passed for check in finding.checks)
    assert finding.summary.endswith(".")
    assert "nan" not in finding.summary


def decisions(finding):
    return [contrast.decision for contrast in finding.primary]


class Words:
    """A world of independent tokens with these probabilities, whose words have categories."""

    name, params = "words", {}

    def __init__(self, law, categories=None):
        self.law, self.vocab_size, self.categories = np.asarray(law, float), len(law), categories
        self.symbols = tuple(f"w{v}" for v in range(len(law)))

    def sample(self, key, n, length):
        seed = int(jax.random.randint(key, (), 0, 1 << 30))
        return np.random.default_rng(seed).choice(len(self.law), (n, length), p=self.law / self.law.sum())


def with_vectors(E, U=None, **choices):
    """A small model whose token vectors, and output vectors, are these."""
    model = model_of(vocab_size=len(E), width=E.shape[1], depth=1, **choices)
    unembed = model.unembed if U is None else Unembed(jnp.asarray(U, jnp.float32), None)
    return dataclasses.replace(model, embed=Embed(jnp.asarray(E, jnp.float32)), unembed=unembed)


def clusters(categories, each, width=16, noise=0.05, seed=0):
    """Unit centres with words around them, and the words' labels."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(width, width)))[0][:categories]
    labels = np.repeat(np.arange(categories), each)
    return centres[labels] + noise * rng.normal(size=(len(labels), width)), labels


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# Permutations.


def test_permutations_keep_groups_and_reach_all_of_them():
    groups, rng = np.array([0, 1, 0, 1, 0]), np.random.default_rng(0)
    drawn = [tuple(statistics.permute_within(groups, rng)) for _ in range(1200)]
    assert all(np.array_equal(groups[list(p)], groups) for p in drawn)
    times = collections.Counter(drawn)
    assert len(times) == math.factorial(3) * math.factorial(2)
    assert min(times.values()) > 60  # 100 each, within 4 standard deviations
    assert set(statistics.permute_within(np.zeros(9, int), rng)) == set(range(9))


def test_quantile_groups_by_hand():
    np.testing.assert_array_equal(statistics.quantile_groups(np.array([5.0, 1, 9, 3, 7, 2]), 3), [1, 0, 2, 1, 2, 0])


# Measures of concepts.


def test_scores_by_hand():
    # On a line of angles: 0 and 10 degrees are of one category, 20 and 90 of the other.
    angle = np.radians([0, 10, 20, 90])
    near = _word_vectors.Nearness.of(np.stack([np.cos(angle), np.sin(angle)], 1), 1)
    labels = np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(near.neighbours[:, 0][[0, 2, 3]], [1, 1, 2])
    np.testing.assert_array_equal(_word_vectors.precision(near, labels)[[0, 2, 3]], [1, 0, 1])
    np.testing.assert_allclose(_word_vectors.pair_auc(near, labels)[[0, 2, 3]], [1, 0, 1])
    a, b = 1 - np.cos(np.radians(10)), 1 - np.cos(np.radians([20, 90])).mean()
    assert _word_vectors.silhouette(near, labels)[0] == pytest.approx((b - a) / b)


def direct(vectors, labels, k):
    """All measures by loops over words."""
    unit_vectors, W, folds = unit(vectors), len(labels), {}
    cos = unit_vectors @ unit_vectors.T
    F = min(_word_vectors.FOLDS, min(collections.Counter(labels.tolist()).values()))
    for c in set(labels):
        for n, w in enumerate(np.flatnonzero(labels == c)):
            folds[w] = n % F
    rows = []
    for w in range(W):
        others = [j for j in range(W) if j != w]
        nearest = sorted(others, key=lambda j: -cos[w, j])[:k]
        same = [j for j in others if labels[j] == labels[w]]
        rest = [j for j in others if labels[j] != labels[w]]
        auc = np.mean([(cos[w, s] > cos[w, r]) + 0.5 * (cos[w, s] == cos[w, r]) for s in same for r in rest])
        a = np.mean([1 - cos[w, j] for j in same])
        b = min(np.mean([1 - cos[w, j] for j in rest if labels[j] == c]) for c in set(labels) - {labels[w]})
        fit = [j for j in range(W) if folds[j] != folds[w]]
        inside = np.mean([unit_vectors[j] for j in fit if labels[j] == labels[w]], axis=0)
        outside = np.mean([unit_vectors[j] for j in fit if labels[j] != labels[w]], axis=0)
        along = unit_vectors @ (inside - outside)
        further = np.mean([along[w] > along[r] for r in rest if folds[r] == folds[w]])
        rows.append([np.mean(labels[nearest] == labels[w]), auc, (b - a) / max(a, b), further])
    return np.array(rows)


def test_scores_agree_with_loops_over_words():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1, 2], [4, 7, 9]))
    vectors = rng.normal(size=(20, 5)) + np.eye(5)[labels]
    near = _word_vectors.Nearness.of(unit(vectors), 3)
    np.testing.assert_allclose(_word_vectors.word_scores(near, labels), direct(vectors, labels, 3), atol=1e-12)


def test_planted_clusters_have_every_measure_at_its_best():
    vectors, labels = clusters(4, 6)
    scores = _word_vectors.word_scores(_word_vectors.Nearness.of(unit(vectors), 5), labels).mean(0)
    np.testing.assert_array_equal(scores[[0, 1, 3]], 1)
    assert scores[2] > 0.9


def test_random_vectors_are_at_chance_and_held_out_directions_too():
    # More dimensions than words: fitted directions would separate every labelling, held-out ones must not.
    labels = np.repeat(np.arange(4), 8)
    rng = np.random.default_rng(0)
    means = np.stack(
        [
            _word_vectors.word_scores(_word_vectors.Nearness.of(unit(rng.normal(size=(32, 64))), 7), labels).mean(0)
            for _ in range(60)
        ]
    )
    error = means.std(0) / np.sqrt(len(means))
    assert (np.abs(means.mean(0) - [7 / 31, 0.5, 0, 0.5])[[0, 1, 3]] < 4 * error[[0, 1, 3]]).all()


def test_analogies_by_hand(monkeypatch):
    # Pairs (v, v + shift) on a grid; a decoy lies next to c, so that without the offset c's neighbour is wrong.
    table = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 0.1], [-1, -1, -1]], np.float32)
    identity = _word_vectors.Arrangement(np.zeros(3), None)
    quadruples = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 2, 5]])
    expected = [[True, False], [True, True], [False, False]]
    np.testing.assert_array_equal(_word_vectors.solve(quadruples, table, identity), expected)
    monkeypatch.setattr(_word_vectors, "CHUNK", 2)
    np.testing.assert_array_equal(_word_vectors.solve(quadruples, table, identity), expected)


# Arrangements.


def test_whitening_makes_the_covariance_the_identity():
    rng = np.random.default_rng(0)
    U = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3
    mean, covariance = _word_vectors.moments(U)
    np.testing.assert_allclose(covariance, np.cov(U.T, bias=True), rtol=1e-10)
    white = (U - mean) @ _word_vectors.whitening(covariance, 0.0)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(6), atol=1e-9)
    values = np.linalg.eigvalsh(np.cov(((U - mean) @ _word_vectors.whitening(covariance, 0.1)).T, bias=True))
    own = np.linalg.eigvalsh(covariance)
    np.testing.assert_allclose(values, own / (own + 0.1 * own.mean()), rtol=1e-8)


def test_each_arrangement_is_blind_to_what_it_should_be():
    rng = np.random.default_rng(0)
    U, A, shift = rng.normal(size=(60, 5)), rng.normal(size=(5, 5)), rng.normal(size=5)

    def cosines(X):
        return {
            name: (rows := arrange(X)) @ rows.T for name, arrange in _word_vectors.arrangements(X, X, ridge=0.0).items()
        }

    plain, moved, mapped = cosines(U), cosines(U + shift), cosines(U @ A + shift)
    assert set(plain) == set(_word_vectors.ARRANGEMENTS)
    for name in ("centred", "minus_top", "whitened"):
        np.testing.assert_allclose(moved[name], plain[name], atol=1e-10)
    assert np.abs(moved["raw"] - plain["raw"]).max() > 0.1
    # The causal inner product does not depend on the coordinates of the space; cosine does.
    np.testing.assert_allclose(mapped["whitened"], plain["whitened"], atol=1e-9)
    assert np.abs(mapped["centred"] - plain["centred"]).max() > 0.1
    top = np.linalg.svd(U - U.mean(0))[2][0]
    rows = _word_vectors.arrangements(U, U)["minus_top"](U)
    np.testing.assert_allclose(rows @ top, 0, atol=1e-12)
    np.testing.assert_allclose((rows**2).sum(1), 1)


def test_too_few_output_vectors_are_not_whitened():
    X = np.random.default_rng(0).normal(size=(9, 5))
    assert "whitened" not in _word_vectors.arrangements(X, X)


# Words.


def test_the_shipped_words_are_in_one_category_each():
    concepts = _concepts.read_concepts(_concepts.FILE)
    assert len(concepts.categories) >= 15
    for group in (concepts, concepts.characters):
        words = list(itertools.chain(*group.categories.values()))
        assert len(words) == len(set(words))
        assert min(map(len, group.categories.values())) >= 5
        for a, b, c, d in itertools.chain(*group.analogies.values()):
            assert len({a, b, c}) == 3
            assert d not in (a, b, c)
    assert all(len(word) == 1 for words in concepts.characters.categories.values() for word in words)


class Spaced:
    """Words as a tokenizer has them: some with the space before them, some without, some in two tokens."""

    begin = None

    def __init__(self, *spelled):
        self.spelled = spelled

    def encode(self, text):
        return np.array([self.spelled.index(text)] if text in self.spelled else [0, 0])

    def symbol(self, token):
        return self.spelled[token]


def test_a_word_is_one_token_with_or_without_a_space():
    vocabulary = Spaced("x", " dog", "dog", "cat")
    assert [_concepts.single_token(vocabulary, w) for w in ("dog", "cat", "cow")] == [1, 3, None]
    assert _concepts.single_token(SymbolVocabulary(("A", "B")), "B") == 1
    assert _concepts.single_token(SymbolVocabulary(("A", "B")), "C") is None
    assert [_concepts.single_token(ByteVocabulary(), w) for w in ("a", "ab")] == [97, None]


def test_unknown_and_ambiguous_words_are_counted_and_named(tmp_path):
    beasts, hues = [f"beast{i}" for i in range(5)], [f"hue{i}" for i in range(5)]
    missing = [f"missing{i:02d}" for i in range(20)]
    data = {"categories": {"beasts": [*beasts, "both", *missing], "hues": [*hues, "both"], "rare": ["rare0", "no"]}}
    (tmp_path / "mine.json").write_text(json.dumps(data))
    vocabulary = Spaced(*(f" {w}" for w in (*beasts, *hues, "both", "rare0")))
    E, _ = clusters(2, 5)
    subject = Subject(model=with_vectors(np.concatenate([E, E[:2]]), tied=True), vocabulary=vocabulary)
    finding = concept_space.analyse(subject, concepts=tmp_path / "mine.json", permutations=50)
    holds(finding, "precision_centred")
    assert finding.measured["precision_centred"] == 1
    assert "of 33 words" in finding.conventions["unknown"]
    assert "21 (missing00, missing01, " in finding.conventions["unknown"]
    assert "missing12" not in finding.conventions["unknown"]
    assert finding.conventions["categories"] == "beasts 5, hues 5"
    assert finding.conventions["ambiguous"].startswith("1 words")
    assert finding.conventions["left_out"].endswith("rare 1")
    assert "not available" in finding.conventions["untrained"]
    assert "not available" in finding.conventions["frequency_matched"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot be read as JSON .*Expected \{\"categories\""),
        ("[1]", r"expected an object with categories, got \[1\]"),
        ('{"categories": {"a": "bc"}}', "expected category 'a' to be a list of words"),
        ('{"categories": {"a": [1]}}', r"category 'a' .* got \[1\]"),
        ('{"categories": {}, "words": {}}', "categories and analogies only"),
        ('{"categories": {}, "analogies": {"r": [["a", "b", "c"]]}}', "relation 'r' to be a list of four words"),
        ('{"categories": {}, "analogies": []}', "analogies to be an object"),
        ('{"categories": {}, "characters": {}}', "characters: expected an object with categories"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(content, message, tmp_path):
    (tmp_path / "bad.json").write_text(content)
    subject = Subject(model=model_of(), vocabulary=ByteVocabulary())
    with pytest.raises(ConfigError, match=message):
        concept_space.analyse(subject, concepts=tmp_path / "bad.json")
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        _concepts.read_concepts(tmp_path / "nothing.json")


def test_what_has_no_concepts():
    with pytest.raises(ConfigError, match="k: expected at least 1, got 0"):
        concept_space.analyse(Subject(model=model_of()), k=0)
    with pytest.raises(NotApplicable, match="uniform have no categories"):
        concept_space.analyse(Subject(model=model_of(), world=Uniform(5)))
    with pytest.raises(NotApplicable, match="or a vocabulary"):
        concept_space.analyse(Subject(model=model_of()))
    few = Words(np.ones(8), {"nouns": (0, 1, 2, 3, 4), "verbs": (5, 6)})
    with pytest.raises(NotApplicable, match="found nouns 5, verbs 2"):
        concept_space.analyse(Subject(model=model_of(vocab_size=8), world=few))
    with pytest.raises(NotApplicable, match="token 8, and the model 8"):
        concept_space.analyse(Subject(model=model_of(vocab_size=8), world=Words(np.ones(8), {"nouns": (8,)})))
    with pytest.raises(NotApplicable, match=r"words: expected .* found .* 0; characters: expected"):
        concept_space.analyse(Subject(model=model_of(), vocabulary=SymbolVocabulary(tuple("ABCDE"))))


# Whole analyses of concepts.


def grammar(categories=4, each=8):
    law = np.random.default_rng(0).uniform(0.5, 1.5, categories * each)
    names = {f"kind{c}": tuple(range(c * each, (c + 1) * each)) for c in range(categories)}
    return Words(law, names)


def test_concept_space_of_planted_concepts():
    E, _ = clusters(4, 8, noise=0.1)
    U = np.random.default_rng(5).normal(size=E.shape)
    model, null = with_vectors(E, U), model_of(vocab_size=32, width=16, depth=1, seed=7)
    finding = concept_space.analyse(Subject(model=model, untrained=null, world=grammar()))
    keys = [f"{m}_{a}" for m in _word_vectors.MEASURES for a in _word_vectors.ARRANGEMENTS]
    holds(finding, *keys, *(f"{key}_output" for key in keys))
    assert next(iter(finding.measured)) == "precision_centred"
    assert set(finding.interval) == set(finding.measured)
    assert finding.measured["precision_centred"] > 0.95
    for name in ("permuted", "frequency_matched", "random"):
        assert finding.null[name] == pytest.approx(7 / 31, abs=0.05)
    assert finding.null["untrained"] < 0.5
    assert decisions(finding) == ["supported"] * 3
    assert finding.decision == "supported"
    # The output vectors are random.
    assert finding.measured["precision_centred_output"] < 0.4
    assert finding.conventions["concepts"].endswith("world words")
    assert [f.name for f in finding.figures] == ["concept_precision", "category_cosine", "concept_map"]
    cosine = finding.arrays["category_cosine"]
    assert (np.diag(cosine) > cosine[~np.eye(4, dtype=bool)].max()).all()


def test_words_of_one_category_are_one_unit_where_there_are_enough_categories():
    E, _ = clusters(10, 6, noise=0.5)
    subject = Subject(model=with_vectors(E, tied=True), world=grammar(10, 6))
    finding = concept_space.analyse(subject, permutations=9)
    assert finding.conventions["units"] == "the 10 categories"
    assert finding.primary[0].units == 10
    few = concept_space.analyse(Subject(model=with_vectors(E[:30], tied=True), world=grammar(5, 6)), permutations=9)
    assert decisions(few) == ["not testable here"]
    assert "30 words are known, and 32 are needed" in few.summary


def test_the_mean_cosine_within_a_category_leaves_out_a_word_with_itself():
    E, labels = clusters(3, 4, width=8, noise=0.5)
    names = {str(c): tuple(np.flatnonzero(labels == c).tolist()) for c in range(3)}
    subject = Subject(model=with_vectors(E, tied=True), world=Words(np.ones(12), names))
    pairs = concept_space.analyse(subject, permutations=9).arrays["category_cosine"]
    cosine = unit(E - E.mean(0)) @ unit(E - E.mean(0)).T
    for a, b in itertools.product(range(3), repeat=2):
        expected = [cosine[i, j] for i in names[str(a)] for j in names[str(b)] if i != j]
        assert pairs[a, b] == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize(("categories", "each"), [(4, 8), (10, 6)])
def test_vectors_that_know_no_categories_support_no_concepts(categories, each, by_frequency):
    """At most 5% of contrasts, over 20 seeds of vectors; where categories differ in frequency, so do the vectors."""
    supported = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        log_law = rng.normal(size=categories * each)
        world = grammar(categories, each)
        world.law = np.exp(np.sort(log_law) if by_frequency else log_law)
        slope = 3 * by_frequency * (np.log(world.law) - np.log(world.law).mean())[:, None]
        mine, null = (slope * np.eye(16)[:1] + rng.normal(size=(len(log_law), 16)) for _ in range(2))
        subject = Subject(
            with_vectors(mine, tied=True), untrained=with_vectors(null, tied=True), world=world, seed=seed
        )
        supported += [d == "supported" for d in decisions(concept_space.analyse(subject, permutations=19))]
    assert np.mean(supported) <= 0.05


def test_what_frequency_alone_groups_is_not_called_a_concept():
    # Vectors lie along a curve of frequency, and categories are the rare, the middling and the frequent.
    law = np.geomspace(1, 200, 48)
    phase = np.linspace(0, 2.5, 48)[:, None]
    E = np.concatenate([np.cos(phase), np.sin(phase)], 1) + 0.05 * np.random.default_rng(0).normal(size=(48, 2))
    world = Words(law, {"rare": tuple(range(16)), "middling": tuple(range(16, 32)), "frequent": tuple(range(32, 48))})
    finding = concept_space.analyse(Subject(model=with_vectors(E, tied=True, aggregate="identity"), world=world))
    holds(finding)
    assert finding.measured["precision_centred"] > 0.8
    assert finding.null["permuted"] < 0.5
    assert finding.null["frequency_matched"] > 0.6
    assert finding.primary[0].null == "frequency_matched"
    assert "supported" not in decisions(finding)


def test_concept_space_of_bytes_looks_at_characters():
    finding = concept_space.analyse(
        Subject(model=model_of(vocab_size=257), vocabulary=ByteVocabulary()), permutations=20
    )
    holds(finding, "precision_centred", "analogy_centred", "analogy_whitened_output")
    assert finding.conventions["concepts"].startswith("characters of concepts.json")
    assert finding.conventions["unknown"].startswith("of 89 characters")
    assert finding.null["analogy_centred.chance"] == 1 / 254
    assert "supported" not in decisions(finding)


# Counts of pairs.


def counted(tokens, segments=None, V=6, **choices):
    tokens = np.asarray(tokens)
    choices = {"window": 1, "least": 1, "pairs": 1000, "most": 1000, **choices}
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    return co_occurrence.count_pairs(tokens, segments, V, **choices)


def test_pmi_by_hand():
    # Pairs at distance 1 are 01, 12, 20 and 01, 11, 10: six, of which two begin with 0 and three end with 1.
    counts = counted([[0, 1, 2, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(counts.pairs, [[0, 1], [1, 0], [1, 2], [2, 0]])
    np.testing.assert_allclose(counts.pmi(0.0), np.log([2 * 6 / (2 * 3), 6 / (3 * 2), 6 / (3 * 1), 6 / (1 * 2)]))
    np.testing.assert_allclose(counts.pmi(1.0)[0], np.log((2 + 1) / (2 * 3 / 6 + 1)))


def brute(tokens, segments, window):
    joint = collections.Counter()
    for row, of in zip(tokens, segments, strict=True):
        for i in range(len(row)):
            for j in range(i + 1, min(i + window, len(row) - 1) + 1):
                if of[i] == of[j] > 0:
                    joint[int(row[i]), int(row[j])] += 1
    return joint


@pytest.mark.parametrize("window", [1, 3, 50])
def test_counts_agree_with_loops_over_places(window):
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(0, 6, (150, 9)), np.sort(rng.integers(0, 4, (150, 9)), axis=1)
    counts, joint = counted(tokens, segments, window=window, least=5), brute(tokens, segments, window)
    expected = {pair: n for pair, n in joint.items() if n >= 5 and pair[0] != pair[1]}
    assert expected == {tuple(p): n for p, n in zip(counts.pairs.tolist(), counts.joint, strict=True)}
    first, second = collections.Counter(), collections.Counter()
    for (a, b), n in joint.items():
        first[a] += n
        second[b] += n
    np.testing.assert_array_equal(counts.first, [first[a] for a, _ in counts.pairs.tolist()])
    np.testing.assert_array_equal(counts.second, [second[b] for _, b in counts.pairs.tolist()])
    assert counts.total == sum(joint.values())


def test_the_most_frequent_pairs_and_tokens_are_kept():
    tokens = np.array([[0, 1] * 5, [0, 2] * 5, [3, 4] * 4 + [0, 2], [0, 1] * 5])
    assert counted(tokens, pairs=2).pairs.tolist() == [[0, 1], [1, 0]]
    some = counted(tokens, most=3)
    assert set(some.pairs.ravel()) == {0, 1, 2}
    everything = counted(tokens)
    at = [everything.pairs.tolist().index(pair) for pair in some.pairs.tolist()]
    np.testing.assert_allclose(some.pmi(0.5), everything.pmi(0.5)[at])


# Nearness of tokens, and its correlation with PMI.


def test_similarities_by_hand():
    E = np.array([[1.0, 0], [0, 2], [-1, -2], [4, 0]])
    U = np.array([[1.0, 1], [3, 1], [5, 1], [7, 1]])
    tied = co_occurrence.similarities(with_vectors(E, tied=True, aggregate="identity"), np.array([0, 1, 3]))
    assert "input_output" not in tied
    near = co_occurrence.similarities(with_vectors(E, U, aggregate="identity"), np.array([0, 1, 3]))
    assert near["dot"]()[0, 2] == 4
    assert near["cosine"]()[0, 1] == 0
    assert near["distance"]()[0, 1] == pytest.approx(-np.sqrt(5))
    np.testing.assert_allclose(near["centred_cosine"]()[1], [0, 1, -1 / np.sqrt(5)], rtol=1e-6)  # the mean is (1, 0)
    np.testing.assert_allclose(near["input_output"]()[0], [-3, -1, 3])


def test_token_values_are_the_correlation_and_what_it_is_without_each_token():
    rng = np.random.default_rng(0)
    a, b = np.array([(i, j) for i in range(9) for j in range(9) if i != j and (i + j) % 4]).T
    x = rng.normal(size=len(a))
    y = x + rng.normal(size=len(a))
    values = co_occurrence.token_values(x, y, a, b)
    expected = np.corrcoef(x, y)[0, 1]
    assert co_occurrence.correlation(x, y) == pytest.approx(expected)
    assert values.mean() == pytest.approx(expected)
    without = [np.corrcoef(x[keep], y[keep])[0, 1] for keep in ((a != t) & (b != t) for t in range(9))]
    np.testing.assert_allclose(values - values.mean(), -8 * (without - np.mean(without)), atol=1e-9)
    np.testing.assert_array_equal(co_occurrence.token_values(x, np.ones(len(a)), a, b), 0)


def test_intervals_over_tokens_cover_the_correlation():
    """Pairs of tokens that are alike or not, in two ways that are related, and a new sample of tokens each time."""
    rng, covered, m = np.random.default_rng(0), [], 24
    a, b = np.array([(i, j) for i in range(m) for j in range(m) if i != j]).T

    def pairs(size):
        latent = rng.normal(size=(size, 2))
        return -np.abs(latent[a % size, 0] - latent[b % size, 0]), -np.abs(latent[a % size] - latent[b % size]).sum(1)

    many = rng.normal(size=(2, 200_000, 2))
    truth = np.corrcoef(-np.abs(many[0] - many[1])[:, 0], -np.abs(many[0] - many[1]).sum(1))[0, 1]
    for _ in range(200):
        low, high = Quantity("r", co_occurrence.token_values(*pairs(m), a, b)).interval
        covered.append(low < truth < high)
    assert np.mean(covered) > 0.88


def chain(seed=0, V=24):
    """A Markov chain whose pairs differ much in their PMI."""
    world = jw.worlds.make("markov", vocab_size=V, order=1, seed=seed)
    tokens = np.asarray(world.sample(jax.random.key(9), 20_000, 12))
    joint = np.full((V, V), 0.5)
    np.add.at(joint, (tokens[:, :-1], tokens[:, 1:]), 1)
    joint /= joint.sum()
    return world, np.log(joint / joint.sum(1, keepdims=True) / joint.sum(0))


def test_planted_pmi_is_found():
    world, pmi = chain()
    model = with_vectors(np.eye(24), pmi.T, max_length=12)
    null = model_of(vocab_size=24, max_length=12, width=24, depth=1, seed=3)
    subject = Subject(model=model, untrained=null, world=world)
    finding = co_occurrence.analyse(subject, window=1, tokens=1 << 17)
    names = [f"{kind}_{name}" for kind in co_occurrence.KINDS for name in co_occurrence.LABELS]
    holds(finding, *names)
    # Output vectors are centred over the vocabulary, which takes the mean of every row of PMI away.
    a, b = finding.arrays["pairs"].T
    expected = np.corrcoef((pmi - pmi.mean(1, keepdims=True))[a, b], pmi[a, b])[0, 1]
    assert finding.measured["pearson_input_output"] == pytest.approx(expected, abs=0.05)
    assert abs(finding.null["spearman_input_output.permuted"]) < 0.2
    # All token vectors are equally far from each other: nothing to find there.
    assert finding.measured["pearson_cosine"] == pytest.approx(0, abs=1e-6)
    assert "supported" not in decisions(finding)


def near_pairs(V=24, seed=0):
    """A world whose tokens follow those with near vectors, and the vectors."""
    rng = np.random.default_rng(seed)
    E = unit(rng.normal(size=(V, 3)))
    law = np.exp(3 * E @ E.T)
    return Steps(law / law.sum(1, keepdims=True)), E


class Steps(Uniform):
    """A Markov chain with these transitions, from a uniform start."""

    def __init__(self, transitions):
        super().__init__(len(transitions))
        self.transitions = transitions

    def sample(self, key, n, length):
        rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 1 << 30)))
        cumulative = np.cumsum(self.transitions, axis=1)
        path = [rng.integers(0, self.vocab_size, n)]
        for _ in range(length - 1):
            path.append((cumulative[path[-1]] < rng.random(n)[:, None]).sum(1).clip(max=self.vocab_size - 1))
        return np.stack(path, axis=1)


def test_near_tokens_that_occur_together_support_the_claim_and_permuted_ones_do_not():
    world, E = near_pairs()
    null = with_vectors(np.random.default_rng(1).normal(size=E.shape), tied=True, aggregate="identity")
    subject = Subject(with_vectors(E, tied=True, aggregate="identity"), untrained=null, world=world)
    finding = co_occurrence.analyse(subject, tokens=1 << 15, window=1, permutations=19)
    holds(finding)
    assert decisions(finding) == ["supported", "supported"]
    assert finding.primary[0].units == 24
    assert np.all(finding.arrays["draws"] < finding.measured["spearman_centred_cosine"])
    other = dataclasses.replace(subject, model=with_vectors(E[::-1].copy(), tied=True, aggregate="identity"))
    assert "supported" not in decisions(co_occurrence.analyse(other, tokens=1 << 15, window=1, permutations=19))
    world, E = near_pairs(12)
    few = co_occurrence.analyse(Subject(with_vectors(E, tied=True, aggregate="identity"), world=world), tokens=1 << 13)
    assert decisions(few) == ["not testable here"]
    assert "12 tokens occur in pairs" in few.summary


def test_random_vectors_support_no_co_occurrence():
    world, _ = near_pairs()
    supported = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mine, null = (with_vectors(rng.normal(size=(24, 8)), tied=True, aggregate="identity") for _ in range(2))
        subject = Subject(mine, untrained=null, world=world, seed=seed)
        supported += [
            d == "supported" for d in decisions(co_occurrence.analyse(subject, tokens=1 << 13, permutations=19))
        ]
    assert np.mean(supported) <= 0.05


def test_what_frequency_alone_predicts_is_not_called_co_occurrence():
    # Independent tokens: which rare pairs are seen often enough is chance, and their PMI is high for that reason.
    law = 1 / np.arange(1, 41)
    E = np.stack([np.linspace(0, 1, 40), 0.3 * np.ones(40)], 1)  # the dot product is large where both are rare
    E = E + 0.02 * np.random.default_rng(0).normal(size=E.shape)
    subject = Subject(model=with_vectors(E, tied=True, aggregate="identity", max_length=12), world=Words(law))
    finding = co_occurrence.analyse(subject, tokens=20_000, least=15, window=1)
    holds(finding)
    assert finding.null["spearman_dot.frequency"] < -0.2
    assert finding.measured["spearman_dot"] > 0.2
    matched = finding.null["spearman_dot.frequency_matched"]
    assert finding.interval["spearman_dot"][0] < matched + co_occurrence.SMALLEST_CORRELATION
    assert abs(finding.null["spearman_dot.permuted"]) < 0.1
    assert "supported" not in decisions(finding)


class Alternating(Uniform):
    """Tokens of the lower half of the vocabulary and of the upper half, in turn: those of one half never touch."""

    def sample(self, key, n, length):
        half = self.vocab_size // 2
        return jax.random.randint(key, (n, length), 0, half) + half * (jnp.arange(length) % 2)


def test_tokens_that_stand_for_each_other_and_not_beside_each_other_contradict_the_claim():
    E, _ = clusters(2, 10, width=8)
    finding = co_occurrence.analyse(
        Subject(model=with_vectors(E, tied=True), world=Alternating(20)), tokens=1 << 16, window=3
    )
    holds(finding)
    assert finding.measured["spearman_centred_cosine"] < -0.5
    assert decisions(finding) == ["contradicted"]


def test_co_occurrence_in_text(tmp_path):
    rng = np.random.default_rng(0)
    words = ["the cat", "sat on", "a mat", "and so", "did the dog"]
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(" ".join(rng.choice(words, 80)))
    store = open_store(TextData(str(tmp_path), store=str(tmp_path / "store"), validation=0.5))
    model = model_of(vocab_size=257, max_length=32)
    subject = Subject(model=model, untrained=model_of(vocab_size=257, max_length=32, seed=7), store=store)
    finding = co_occurrence.analyse(dataclasses.replace(subject, vocabulary=store.vocabulary), permutations=20)
    holds(finding, "spearman_centred_cosine", "spearman_input_output", "pearson_distance_adjacent")
    assert next(iter(finding.measured)) == "spearman_centred_cosine"
    assert set(finding.interval) == set(finding.measured)
    assert {f"spearman_dot.{n}" for n in ("permuted", "frequency_matched", "untrained", "frequency")} <= set(
        finding.null
    )
    # Every token of the split is counted once, whatever the windows.
    assert finding.conventions["counted"].startswith(f"{len(store.validation.tokens)} tokens")
    assert ("t", "h") in {tuple(chr(v) for v in pair) for pair in finding.arrays["pairs_adjacent"]}
    assert [f.name for f in finding.figures] == ["correlation", "pairs"]


def test_what_has_no_co_occurrence():
    with pytest.raises(NotApplicable, match="it needs paths"):
        co_occurrence.analyse(Subject(model=model_of()))
    with pytest.raises(NotApplicable, match="with 3 tokens"):
        co_occurrence.analyse(Subject(model=model_of(vocab_size=3), world=Uniform(3)))
    with pytest.raises(NotApplicable, match="one token"):
        co_occurrence.analyse(Subject(model=model_of(max_length=1), world=Uniform(5)))
    with pytest.raises(NotApplicable, match="often enough, found 0 of 0"):
        co_occurrence.analyse(Subject(model=model_of(), world=Uniform(5)), least=10**9)
    for wrong in ({"smoothing": 0.0}, {"window": 0}, {"least": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected .*, got 0"):
            co_occurrence.analyse(Subject(model=model_of(), world=Uniform(5)), **wrong)


# Nearness of contexts.


def subject_of(world, *, untrained=True, **choices):
    choices = {"vocab_size": world.vocab_size, "max_length": 8, **choices}
    null = model_of(0.2, seed=7, **choices) if untrained else None
    return Subject(model=model_of(**choices), untrained=null, world=world)


def test_nearness_by_hand_and_the_identity():
    rng = np.random.default_rng(0)
    c, U = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    near = proximity.nearness(jnp.asarray(c), jnp.asarray(U))
    np.testing.assert_allclose(near["distance"], -0.5 * ((c[:, None] - U) ** 2).sum(-1), rtol=1e-5)
    cosine = c[0] @ U[0] / np.linalg.norm(c[0]) / np.linalg.norm(U[0])
    np.testing.assert_allclose(near["cosine"][0, 0], cosine, rtol=1e-5)
    assert tuple(near) == proximity.PREDICTORS[:3]
    assert proximity.identity_error(c.astype(float), U) < 1e-14


def test_scores_of_nearness_by_hand():
    rng = np.random.default_rng(0)
    U, c = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    log_p = np.asarray(jax.nn.log_softmax(c @ U.T))
    following, unigram = np.array([3, 5]), np.log(np.arange(1, 7) / 21).astype(np.float32)
    inputs = [jnp.asarray(a) for a in (U, following, log_p, c, unigram)]
    scores = jax.tree.map(np.asarray, proximity.scores(*inputs))
    dot, frequency = proximity.PREDICTORS.index("dot"), proximity.PREDICTORS.index("unigram")
    assert proximity.share(scores["sums"])[dot] == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(scores["agreement"][dot], 1)
    opposite = jax.tree.map(np.asarray, proximity.scores(*inputs[:3], -inputs[3], inputs[4]))
    assert proximity.share(opposite["sums"])[dot] == pytest.approx(-1, abs=1e-6)
    assert opposite["agreement"][dot, 0] == 0
    assert scores["loss"][dot] == pytest.approx(-log_p[[0, 1], following].mean(), rel=1e-5)
    assert scores["model_loss"] == pytest.approx(scores["loss"][dot], rel=1e-5)
    assert scores["loss"][frequency] == pytest.approx(-np.log([4 / 21, 6 / 21]).mean(), rel=1e-5)
    squares = -0.5 * ((c[:, None] - U) ** 2).sum(-1)
    expected = -(squares - np.log(np.exp(squares).sum(-1, keepdims=True)))[[0, 1], following].mean()
    assert scores["loss"][0] == pytest.approx(expected, rel=1e-4)


def test_proximity():
    finding = proximity.analyse(subject_of(Uniform(12)), paths=40)
    keys = [f"{what}_{name}" for what in ("share", "top1", "top5", "top10") for name in ("distance", "cosine")]
    holds(finding, *keys, "loss_distance", "share_norm")
    assert {check.name for check in finding.checks} == {"identity_error", "rotation_change", "share_dot_missing"}
    assert "share_dot" not in finding.measured
    nulls = ("random_vector", "other_context", "permuted_tokens", "untrained", "unigram")
    assert {f"{key}.{null}" for key in keys for null in nulls} <= set(finding.null)
    assert {*nulls, "own_law"} <= set(finding.null)
    assert finding.null["top5_distance.chance"] == 5 / 12
    # Nearness agrees with the law of any model, and says nothing of tokens that depend on nothing.
    assert finding.measured["share_distance"] > 0.5
    assert decisions(finding)[1] == "not testable here"
    assert decisions(finding)[0] != "supported"


def exact_chain(spread=0.0):
    """A Markov chain of 8 tokens, and a model of one position that knows it, its output vectors of unequal norms."""
    V = 8
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(0.3 * np.ones(V), V) + 1e-3)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    model = model_of(vocab_size=V, width=32, max_length=12, depth=1, aggregate="identity", filter=None,
                     positions="none", norm="rms_norm")  # fmt: skip
    scale = np.sqrt(32.0)
    E = np.zeros((V, 32))
    E[:, :V] = scale * np.eye(V)
    U = np.zeros((V, 32))
    U[:, :V] = log_p.T / scale
    # What no context vector touches is in no dot product, and in every distance.
    squares = ((U - U.mean(0)) ** 2).sum(1)
    U[:, V] = np.sqrt(squares.max() - squares)
    U[: V // 4, V + 1] = spread
    layer = model.layers[0]
    silent = dataclasses.replace(layer, aggregate=jax.tree.map(jnp.zeros_like, layer.aggregate))
    norm = dataclasses.replace(model.norm, scale=jnp.ones_like(model.norm.scale))
    model = dataclasses.replace(
        model.with_layer(0, aggregate=silent.aggregate),
        embed=Embed(jnp.asarray(E, jnp.float32)),
        norm=norm,
        unembed=Unembed(jnp.asarray(U, jnp.float32), None),
    )
    return Steps(np.exp(log_p)), model


def test_distances_that_predict_what_follows_support_the_claim():
    world, model = exact_chain()
    null = model_of(vocab_size=8, width=32, max_length=12, depth=1, aggregate="identity", filter=None,
                    positions="none", norm="rms_norm", seed=3)  # fmt: skip
    finding = proximity.analyse(Subject(model, untrained=null, world=world), paths=128)
    holds(finding)
    assert decisions(finding) == ["supported", "supported"]
    assert finding.primary[0].null == "unigram"
    # The same law, of output vectors whose norms differ: distances no longer give it.
    spread = proximity.analyse(Subject(exact_chain(spread=4.0)[1], untrained=null, world=world), paths=128)
    assert spread.null["own_law"] == pytest.approx(finding.null["own_law"], abs=1e-5)
    assert decisions(spread)[1] == "contradicted"


@pytest.mark.slow
def test_models_that_were_not_trained_support_no_proximity():
    world, _ = exact_chain()
    choices = {"vocab_size": 8, "max_length": 8, "depth": 1}
    supported = []
    for seed in range(20):
        subject = Subject(
            model_of(seed=seed, **choices), untrained=model_of(seed=90, **choices), world=world, seed=seed
        )
        supported += [d == "supported" for d in decisions(proximity.analyse(subject, paths=32, positions=6))]
    assert np.mean(supported) <= 0.05


def test_an_output_bias_is_what_the_dot_product_does_not_explain():
    finding = proximity.analyse(subject_of(Uniform(12), untrained=False, unembed_bias=True), paths=16)
    holds(finding)
    assert 0 < finding.measured["share_dot"] < 0.9999
    assert "share_dot_missing" not in {check.name for check in finding.checks}


def test_a_vector_added_to_all_output_vectors_changes_no_number():
    subject = subject_of(Uniform(6), untrained=False)
    U = subject.model.unembed
    moved = dataclasses.replace(U, weight=U.weight + 0.5)
    other = dataclasses.replace(subject, model=dataclasses.replace(subject.model, unembed=moved))
    one, two = (proximity.analyse(s, paths=16).measured for s in (subject, other))
    for name in one:
        if name.startswith(("share", "loss")):
            assert one[name] == pytest.approx(two[name], abs=1e-4), name


def test_what_has_no_nearness():
    with pytest.raises(NotApplicable, match="2 tokens"):
        proximity.analyse(Subject(model=model_of(vocab_size=2), world=Uniform(2)))
    with pytest.raises(NotApplicable, match="it needs paths"):
        proximity.analyse(Subject(model=model_of()))
    finding = proximity.analyse(subject_of(Uniform(5), untrained=False, placement="post", depth=1), paths=16)
    holds(finding)
    assert "rotation_change" not in {check.name for check in finding.checks}
    assert "post-norm" in finding.conventions["rotation"]


# Rotation.


def change(model):
    rotated = _rotation.rotate(model, jax.random.key(3))
    assert float(jnp.abs(rotated.token_vectors - model.token_vectors).max()) > 0.1
    tokens = jnp.array([0, 3, 1, 4, 2, 2])
    return float(jnp.abs(next_log_probs(rotated, tokens) - next_log_probs(model, tokens)).max())


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Token shifts, and state spaces of each channel or with a direct term, meet single coordinates.
COORDINATES = {"lru", "rwkv4", "rwkv4_channel_mix", "rwkv7", "s4d", "s5"}


@pytest.mark.parametrize("norm", [slow("rms_norm"), "layer_norm"])
@pytest.mark.parametrize(
    "aggregate",
    quick({"lru", "gru"}, jw.aggregates.names()),
)
def test_rotating_the_space_changes_no_law(aggregate, norm):
    model = model_of(aggregate=aggregate, norm=norm, unembed_bias=True, depth=1)
    if aggregate in COORDINATES:
        with pytest.raises(NotApplicable, match="reads the stream coordinate by coordinate"):
            _rotation.rotate(model, jax.random.key(3))
    else:
        assert change(model) < 1e-4


@pytest.mark.parametrize(
    "choices",
    [
        slow({"tied": True, "placement": "parallel"}),
        {"norm_bias": False, "norm_scale": False, "positions": "sinusoidal", "filter": None},
        slow({"positions": "none", "norm": "rms_norm", "filter": jw.MLPConfig(gated=True, activation="silu")}),
        slow({"norm": "layer_norm", "filter": jw.MLPConfig(bias=False)}),
        {
            "norm": "rms_norm",
            "norm_unit_offset": True,
            "embed_scale": 4.0,
            "embed_norm": True,
            "logit_softcap": 2.0,
            "position_offset": 2,
            "tied": True,
            "aggregate": jw.aggregates.config("attention", qk_norm=True, qk_norm_over="width", softcap=2.0),
        },
    ],
    ids=["tied", "sinusoidal", "gated", "no_bias", "gemma"],
)
def test_rotating_the_space_of_other_models(choices):
    assert change(model_of(depth=1, **choices)) < 1e-4


@pytest.mark.parametrize("norm", [slow("rms_norm"), "layer_norm"])
def test_rotation_is_exact_to_rounding_in_float64(norm, x64):
    model = to64(model_of(norm=norm, unembed_bias=True, aggregate=("attention", "fixed_mixing")))
    rope = jw.aggregates.config("attention", positions="rope", qk_norm=True, kv_heads=2)
    assert change(model) < 1e-10
    assert change(to64(model_of(norm=norm, tied=True, positions="none", aggregate=rope))) < 1e-10


@pytest.mark.parametrize("norm", quick({"layer_norm"}, ["rms_norm", "layer_norm"]))
@pytest.mark.parametrize("placement", quick({"sandwich"}, ["post", "res_post", "sandwich"]))
def test_norms_of_what_is_written_rotate_only_with_one_scale_for_all_coordinates(placement, norm):
    model = model_of(placement=placement, norm=norm, depth=1)
    with pytest.raises(NotApplicable, match=f"{placement}-norm"):
        _rotation.rotate(model, jax.random.key(0))

    def even(norm):
        return norm and dataclasses.replace(norm, scale=jnp.full_like(norm.scale, 1.5))

    names = ("aggregate_out_norm", "filter_out_norm") if placement == "sandwich" else ("aggregate_norm", "filter_norm")
    evened = {name: even(getattr(model.layers[0], name)) for name in names}
    assert change(model.with_layer(0, **evened)) < 1e-4


def test_what_says_nothing_of_how_it_meets_the_stream_is_refused():
    @dataclasses.dataclass
    class Bare:
        table: Linear | None = None

    with pytest.raises(NotApplicable, match="Bare reads the stream coordinate by coordinate"):
        _rotation._rotate_maps(Bare(), np.eye(4), np.ones(4), None)
