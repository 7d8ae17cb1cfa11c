"""Concepts in token vectors, and co-occurrence: by hand, by planted truth, by independent counts, by permutations."""

import collections
import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, t

import jaxwalk as jw
from jaxwalk.analyses import NotApplicable, Subject, _concepts, co_occurrence, concept_space
from jaxwalk.config import ConfigError, TextData
from jaxwalk.evidence import statistics
from jaxwalk.filters import Embed, Unembed
from jaxwalk.text import ByteVocabulary, SymbolVocabulary, open_store
from tests.conftest import model_of
from tests.test_analyses_geometry import Uniform, holds


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


def test_permutation_p_by_hand():
    assert statistics.permutation_p(3.0, np.array([1.0, 2, 3, 4])) == pytest.approx(3 / 5)
    p = statistics.permutation_p(np.array([0.0, 9]), np.arange(8.0).reshape(4, 2))
    np.testing.assert_allclose(p, [1, 1 / 5])


def test_permutation_p_is_uniform_under_the_null():
    draws = np.random.default_rng(0).normal(size=(20, 4000))
    p = statistics.permutation_p(draws[0], draws[1:])
    np.testing.assert_allclose(np.unique(p), np.arange(1, 21) / 20)
    counts = np.unique(p, return_counts=True)[1]
    assert chisquare(counts).pvalue > 0.01


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
    near = concept_space.Nearness.of(np.stack([np.cos(angle), np.sin(angle)], 1), 1)
    labels = np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(near.neighbours[:, 0][[0, 2, 3]], [1, 1, 2])
    np.testing.assert_array_equal(concept_space.precision(near, labels)[[0, 2, 3]], [1, 0, 1])
    np.testing.assert_allclose(concept_space.pair_auc(near, labels)[[0, 2, 3]], [1, 0, 1])
    a, b = 1 - np.cos(np.radians(10)), 1 - np.cos(np.radians([20, 90])).mean()
    assert concept_space.silhouette(near, labels)[0] == pytest.approx((b - a) / b)


def direct(vectors, labels, k):
    """All measures by loops over words."""
    unit_vectors, W, folds = unit(vectors), len(labels), {}
    cos = unit_vectors @ unit_vectors.T
    F = min(concept_space.FOLDS, min(collections.Counter(labels.tolist()).values()))
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
    near = concept_space.Nearness.of(unit(vectors), 3)
    np.testing.assert_allclose(concept_space.word_scores(near, labels), direct(vectors, labels, 3), atol=1e-12)


def test_planted_clusters_have_every_measure_at_its_best():
    vectors, labels = clusters(4, 6)
    scores = concept_space.word_scores(concept_space.Nearness.of(unit(vectors), 5), labels).mean(0)
    np.testing.assert_array_equal(scores[[0, 1, 3]], 1)
    assert scores[2] > 0.9


def test_random_vectors_are_at_chance_and_held_out_directions_too():
    # More dimensions than words: fitted directions would separate every labelling, held-out ones must not.
    labels = np.repeat(np.arange(4), 8)
    rng = np.random.default_rng(0)
    means = np.stack(
        [
            concept_space.word_scores(concept_space.Nearness.of(unit(rng.normal(size=(32, 64))), 7), labels).mean(0)
            for _ in range(60)
        ]
    )
    error = means.std(0) / np.sqrt(len(means))
    assert (np.abs(means.mean(0) - [7 / 31, 0.5, 0, 0.5])[[0, 1, 3]] < 4 * error[[0, 1, 3]]).all()


def test_analogies_by_hand(monkeypatch):
    # Pairs (v, v + shift) on a grid; a decoy lies next to c, so that without the offset c's neighbour is wrong.
    table = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 0.1], [-1, -1, -1]], np.float32)
    identity = concept_space.Arrangement(np.zeros(3), None)
    quadruples = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 2, 5]])
    expected = [[True, False], [True, True], [False, False]]
    np.testing.assert_array_equal(concept_space.solve(quadruples, table, identity), expected)
    monkeypatch.setattr(concept_space, "CHUNK", 2)
    np.testing.assert_array_equal(concept_space.solve(quadruples, table, identity), expected)


# Arrangements.


def test_whitening_makes_the_covariance_the_identity():
    rng = np.random.default_rng(0)
    U = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3
    mean, covariance = concept_space.moments(U)
    np.testing.assert_allclose(covariance, np.cov(U.T, bias=True), rtol=1e-10)
    white = (U - mean) @ concept_space.whitening(covariance, 0.0)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(6), atol=1e-9)
    values = np.linalg.eigvalsh(np.cov(((U - mean) @ concept_space.whitening(covariance, 0.1)).T, bias=True))
    own = np.linalg.eigvalsh(covariance)
    np.testing.assert_allclose(values, own / (own + 0.1 * own.mean()), rtol=1e-8)


def test_each_arrangement_is_blind_to_what_it_should_be():
    rng = np.random.default_rng(0)
    U, A, shift = rng.normal(size=(60, 5)), rng.normal(size=(5, 5)), rng.normal(size=5)

    def cosines(X):
        return {
            name: (rows := arrange(X)) @ rows.T for name, arrange in concept_space.arrangements(X, X, ridge=0.0).items()
        }

    plain, moved, mapped = cosines(U), cosines(U + shift), cosines(U @ A + shift)
    assert set(plain) == set(concept_space.ARRANGEMENTS)
    for name in ("centred", "minus_top", "whitened"):
        np.testing.assert_allclose(moved[name], plain[name], atol=1e-10)
    assert np.abs(moved["raw"] - plain["raw"]).max() > 0.1
    # The causal inner product does not depend on the coordinates of the space; cosine does.
    np.testing.assert_allclose(mapped["whitened"], plain["whitened"], atol=1e-9)
    assert np.abs(mapped["centred"] - plain["centred"]).max() > 0.1
    top = np.linalg.svd(U - U.mean(0))[2][0]
    rows = concept_space.arrangements(U, U)["minus_top"](U)
    np.testing.assert_allclose(rows @ top, 0, atol=1e-12)
    np.testing.assert_allclose((rows**2).sum(1), 1)


def test_too_few_output_vectors_are_not_whitened():
    X = np.random.default_rng(0).normal(size=(9, 5))
    assert "whitened" not in concept_space.arrangements(X, X)


def test_resampling_within_strata_keeps_what_differs_between_them():
    strata = np.repeat([0, 1, 2], 5)
    constant = concept_space.stratified_means(np.array([1.0, 5, 9])[strata][:, None], strata)
    np.testing.assert_allclose(constant, 5)
    values = np.random.default_rng(0).normal(size=(300, 1))
    draws = concept_space.stratified_means(values, np.zeros(300, int))
    assert draws.std() == pytest.approx(values.std() / np.sqrt(300), rel=0.1)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)


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
    finding = concept_space.analyse(Subject(model=model, untrained=null, world=grammar()), permutations=99)
    keys = [f"{m}_{a}" for m in concept_space.MEASURES for a in concept_space.ARRANGEMENTS]
    holds(finding, *keys, *(f"{key}_output" for key in keys))
    assert next(iter(finding.measured)) == "precision_centred"
    assert set(finding.interval) == set(finding.measured)
    assert finding.measured["precision_centred"] > 0.95
    for name in ("permuted", "frequency_matched"):
        assert finding.null[f"precision_centred.{name}_p"] == pytest.approx(0.01)
        assert finding.null[f"precision_centred.{name}"] == pytest.approx(7 / 31, abs=0.05)
    assert finding.null["precision_centred.untrained"] < 0.5
    # The output vectors are random, and their p-values say so.
    assert finding.null["precision_centred_output.permuted_p"] > 0.05
    assert "no evidence" not in finding.verdict
    assert finding.conventions["concepts"].endswith("world words")
    assert [f.name for f in finding.figures] == ["concept_precision", "category_cosine", "concept_map"]
    cosine = finding.arrays["category_cosine"]
    assert (np.diag(cosine) > cosine[~np.eye(4, dtype=bool)].max()).all()


def test_the_mean_cosine_within_a_category_leaves_out_a_word_with_itself():
    E, labels = clusters(3, 4, width=8, noise=0.5)
    names = {str(c): tuple(np.flatnonzero(labels == c).tolist()) for c in range(3)}
    subject = Subject(model=with_vectors(E, tied=True), world=Words(np.ones(12), names))
    pairs = concept_space.analyse(subject, permutations=9).arrays["category_cosine"]
    cosine = unit(E - E.mean(0)) @ unit(E - E.mean(0)).T
    for a, b in itertools.product(range(3), repeat=2):
        expected = [cosine[i, j] for i in names[str(a)] for j in names[str(b)] if i != j]
        assert pairs[a, b] == pytest.approx(np.mean(expected), abs=1e-6)


def test_p_values_of_meaningless_categories_are_not_small():
    rng, p = np.random.default_rng(0), []
    for seed in range(20):
        subject = Subject(model=with_vectors(rng.normal(size=(32, 16)), tied=True), world=grammar(), seed=seed)
        finding = concept_space.analyse(subject, permutations=19)
        p.append([finding.null[f"{m}_centred.permuted_p"] for m in concept_space.MEASURES])
    # Uniform p-values have variance 1/12 and mean 1/2 and half a step: here within 4 standard deviations of it.
    assert (np.abs(np.mean(p, axis=0) - 0.525) < 4 * np.sqrt(1 / 12 / 20)).all()


def test_what_frequency_alone_groups_is_not_called_a_concept():
    # Vectors lie along a curve of frequency, and categories are the rare, the middling and the frequent.
    law = np.geomspace(1, 200, 48)
    phase = np.linspace(0, 2.5, 48)[:, None]
    E = np.concatenate([np.cos(phase), np.sin(phase)], 1) + 0.05 * np.random.default_rng(0).normal(size=(48, 2))
    world = Words(law, {"rare": tuple(range(16)), "middling": tuple(range(16, 32)), "frequent": tuple(range(32, 48))})
    finding = concept_space.analyse(Subject(model=with_vectors(E, tied=True, aggregate="identity"), world=world))
    holds(finding)
    assert finding.measured["precision_centred"] > 0.8
    assert finding.null["precision_centred.permuted_p"] == pytest.approx(1 / 200)
    assert finding.null["precision_centred.frequency_matched_p"] > 0.05
    assert finding.null["precision_centred.frequency_matched"] > 0.6
    assert "like frequency are grouped as well" in finding.verdict


def test_concept_space_of_bytes_looks_at_characters():
    finding = concept_space.analyse(
        Subject(model=model_of(vocab_size=257), vocabulary=ByteVocabulary()), permutations=20
    )
    holds(finding, "precision_centred", "analogy_centred", "analogy_whitened_output")
    assert finding.conventions["concepts"].startswith("characters of concepts.json")
    assert finding.conventions["unknown"].startswith("of 89 characters")
    assert finding.null["analogy_centred.chance"] == 1 / 254
    assert finding.null["precision_centred.permuted_p"] > 0.05
    assert "no evidence of concepts" in finding.verdict


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
    with np.errstate(all="ignore"):  # without one of the paths some pairs do not occur
        whole, _ = counts.pmi(0.0)
    np.testing.assert_allclose(whole, np.log([2 * 6 / (2 * 3), 6 / (3 * 2), 6 / (3 * 1), 6 / (1 * 2)]))
    np.testing.assert_allclose(counts.pmi(1.0)[0][0], np.log((2 + 1) / (2 * 3 / 6 + 1)))
    np.testing.assert_allclose(counts.pmi(1.0)[1][1], np.log([3 / 2, 3 / 4, 3 / 2, 3 / 2]))  # 01, 12, 20


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
    assert expected == {tuple(p): n for p, n in zip(counts.pairs.tolist(), counts.joint.sum(0), strict=True)}
    first, second = collections.Counter(), collections.Counter()
    for (a, b), n in joint.items():
        first[a] += n
        second[b] += n
    np.testing.assert_array_equal(counts.first.sum(0), [first[a] for a, _ in counts.pairs.tolist()])
    np.testing.assert_array_equal(counts.second.sum(0), [second[b] for _, b in counts.pairs.tolist()])
    assert counts.total.sum() == sum(joint.values())
    # What is left without a block is what is counted in the other paths.
    block = np.array_split(np.arange(150), co_occurrence.BLOCKS)[3]
    rest = counted(np.delete(tokens, block, 0), np.delete(segments, block, 0), window=window)
    at = [rest.pairs.tolist().index(pair) for pair in counts.pairs.tolist()]
    np.testing.assert_allclose(counts.pmi(1.0)[1][3], rest.pmi(1.0)[0][at], rtol=1e-12)


def test_the_most_frequent_pairs_and_tokens_are_kept():
    tokens = np.array([[0, 1] * 5, [0, 2] * 5, [3, 4] * 4 + [0, 2], [0, 1] * 5])
    assert counted(tokens, pairs=2).pairs.tolist() == [[0, 1], [1, 0]]
    some = counted(tokens, most=3)
    assert set(some.pairs.ravel()) == {0, 1, 2}
    everything = counted(tokens)
    at = [everything.pairs.tolist().index(pair) for pair in some.pairs.tolist()]
    np.testing.assert_allclose(some.pmi(0.5)[0], everything.pmi(0.5)[0][at])


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


@pytest.mark.parametrize("G", [200, 8])
def test_the_jackknife_of_a_mean_is_its_standard_error(G):
    x = np.random.default_rng(0).normal(size=(G, 2))
    low, high = co_occurrence.jackknife_interval(x.mean(0), (x.sum(0) - x) / (G - 1))
    np.testing.assert_allclose((low + high) / 2, x.mean(0))
    np.testing.assert_allclose(high - low, 2 * t.ppf(0.975, G - 1) * x.std(0, ddof=1) / np.sqrt(G), rtol=1e-9)


def chain(seed=0, V=8):
    """A Markov chain whose pairs differ much in their PMI."""
    world = jw.worlds.make("markov", vocab_size=V, order=1, seed=seed)
    tokens = np.asarray(world.sample(jax.random.key(9), 20_000, 12))
    joint = np.full((V, V), 0.5)
    np.add.at(joint, (tokens[:, :-1], tokens[:, 1:]), 1)
    joint /= joint.sum()
    return world, np.log(joint / joint.sum(1, keepdims=True) / joint.sum(0))


def test_planted_pmi_is_found():
    world, pmi = chain()
    model = with_vectors(np.eye(8), pmi.T, max_length=12)
    null = model_of(vocab_size=8, max_length=12, width=8, depth=1, seed=3)
    subject = Subject(model=model, untrained=null, world=world)
    finding = co_occurrence.analyse(subject, window=1, tokens=1 << 17, permutations=99)
    names = [f"{kind}_{name}" for kind in co_occurrence.KINDS for name in co_occurrence.LABELS]
    holds(finding, *names)
    # Output vectors are centred over the vocabulary, which takes the mean of every row of PMI away.
    off = ~np.eye(8, dtype=bool)
    expected = np.corrcoef((pmi - pmi.mean(1, keepdims=True))[off], pmi[off])[0, 1]
    assert finding.measured["pearson_input_output"] == pytest.approx(expected, abs=0.02)
    assert finding.null["spearman_input_output.permuted_p"] == pytest.approx(0.01)
    # All token vectors are equally far from each other: nothing to find there.
    assert finding.measured["pearson_cosine"] == pytest.approx(0, abs=1e-6)
    assert finding.null["spearman_cosine.permuted_p"] == 1
    assert "no evidence" in finding.verdict


def test_mantel_p_values_of_random_vectors_are_not_small():
    world, _ = chain()
    tokens = np.asarray(world.sample(jax.random.key(1), 2000, 12))
    counts = counted(tokens, V=8, least=10)
    assert len(counts.pairs) > 40
    p, rng = [], np.random.default_rng(0)
    for seed in range(25):
        subject = Subject(model=with_vectors(rng.normal(size=(8, 8)), tied=True), world=world, seed=seed)
        p.append(co_occurrence._correlate(subject, counts, 1.0, 19).table["permuted_p"][0])
    assert (np.abs(np.mean(p, axis=0) - 0.525) < 4 * np.sqrt(1 / 12 / 25)).all()


def test_what_frequency_alone_predicts_is_not_called_co_occurrence():
    # Independent tokens: which rare pairs are seen often enough is chance, and their PMI is high for that reason.
    law = 1 / np.arange(1, 41)
    E = np.stack([np.linspace(0, 1, 40), 0.3 * np.ones(40)], 1)  # the dot product is large where both are rare
    E = E + 0.02 * np.random.default_rng(0).normal(size=E.shape)
    subject = Subject(model=with_vectors(E, tied=True, aggregate="identity", max_length=12), world=Words(law))
    finding = co_occurrence.analyse(subject, tokens=20_000, least=15, window=1, permutations=99)
    holds(finding)
    assert finding.null["spearman_dot.frequency"] < -0.2
    assert finding.measured["spearman_dot"] > 0.2
    assert finding.null["spearman_dot.permuted_p"] == pytest.approx(0.01)
    assert finding.null["spearman_dot.frequency_matched_p"] > 0.05


class Alternating(Uniform):
    """Tokens of the lower half of the vocabulary and of the upper half, in turn: those of one half never touch."""

    def sample(self, key, n, length):
        half = self.vocab_size // 2
        return jax.random.randint(key, (n, length), 0, half) + half * (jnp.arange(length) % 2)


def test_tokens_that_stand_for_each_other_and_not_beside_each_other_are_said_to_be_so():
    E, _ = clusters(2, 4, width=8)
    finding = co_occurrence.analyse(Subject(model=with_vectors(E, tied=True), world=Alternating(8)), window=3)
    holds(finding)
    assert finding.measured["spearman_centred_cosine"] < -0.5
    assert finding.null["spearman_centred_cosine.permuted_p"] > 0.95
    assert finding.verdict.endswith("the opposite of the claim.")


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
    assert {f"spearman_dot.{n}" for n in ("permuted", "frequency_matched_p", "untrained", "frequency")} <= set(
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
