"""Grammar worlds: held to all derivations, to closed forms, and to an inside algorithm of another kind."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import jaxwalk as jw
from jaxwalk import analyses, training, worlds
from jaxwalk.analyses import NotApplicable, Subject
from jaxwalk.config import CheckpointConfig, TrainConfig, WorldData
from jaxwalk.worlds import Grammar

from .conftest import model_of

ANBN = {"S": [(0.4, "a S b"), (0.6, "a b")]}
CATALAN = {"S": [(0.3, "S S"), (0.7, "a")]}
FINITE = {
    "S": [(0.5, "A B"), (0.3, "A c"), (0.2, "B")],
    "A": [(0.6, "a"), (0.4, "a c")],
    "B": [(0.3, "b"), (0.3, "c b"), (0.4, "A A")],
}
UNITS = {"S": [(0.5, "A"), (0.3, "B S"), (0.2, "a")], "A": [(0.1, "B"), (0.9, "a")], "B": [(0.2, "A"), (0.8, "b")]}
LONG = {"S": [(0.2, "a S b S c"), (0.3, "X b X"), (0.5, "c")], "X": [(0.25, "X c"), (0.75, "a")]}
SMALL = {"anbn": ANBN, "catalan": CATALAN, "finite": FINITE, "units": UNITS, "long": LONG}


@functools.cache
def small(name: str) -> Grammar:
    return worlds.grammar(SMALL[name])


@functools.cache
def english() -> Grammar:
    return worlds.grammar()


def derivations(rules, longest: int, least: float = 1e-12):
    """(probability, string) of each leftmost derivation of at most `longest` words, one by one."""
    waiting = [(1.0, ("S",))]
    while waiting:
        p, symbols = waiting.pop()
        at = next((i for i, s in enumerate(symbols) if s in rules), None)
        if at is None:
            yield p, symbols
            continue
        for q, side in rules[symbols[at]]:
            expanded = (*symbols[:at], *side.split(), *symbols[at + 1 :])
            if len(expanded) <= longest and p * q > least:
                waiting.append((p * q, expanded))


def strings(rules, longest: int) -> dict[tuple[str, ...], float]:
    """The probability of each string: the sum over its derivations."""
    total: dict[tuple[str, ...], float] = {}
    for p, string in derivations(rules, longest):
        total[string] = total.get(string, 0.0) + p
    return total


def inside(rules, string) -> float:
    """P(string) by a recursion over spans on the rules as they are, in exact fractions; no cycles of unit rules."""

    @functools.cache
    def spanned(symbols, i, j):
        if len(symbols) > 1:
            cuts = range(i + 1, j - len(symbols) + 2)
            return sum(left * spanned(symbols[1:], k, j) for k in cuts if (left := spanned(symbols[:1], i, k)))
        if symbols[0] not in rules:
            return Fraction(j == i + 1 and string[i] == symbols[0])
        return sum(Fraction(p) * spanned(tuple(side.split()), i, j) for p, side in rules[symbols[0]])

    return float(spanned(("S",), 0, len(string)))


def ids(world: Grammar, text: str) -> np.ndarray:
    return np.array([world.symbols.index(word) for word in text.split()], int)


def text_of(world: Grammar, tokens) -> tuple[str, ...]:
    return tuple(world.symbols[v] for v in tokens)


# The law of strings.


@pytest.mark.parametrize("name", SMALL)
def test_inside_probability_is_a_sum_over_derivations(name, x64):
    world, longest = small(name), 6
    expected = strings(SMALL[name], longest)
    for length in (1, 3, 6):
        everything = np.array(list(itertools.product(range(world.vocab_size), repeat=length)))
        got = np.exp(np.asarray(jax.jit(jax.vmap(world.string_log_prob))(everything)))
        wanted = [expected.get(text_of(world, tokens), 0.0) for tokens in everything]
        np.testing.assert_allclose(got, wanted, atol=1e-9, rtol=1e-9)
        assert (got > 0).sum() == np.count_nonzero(wanted)


def test_ambiguity_is_counted(x64):
    # Binary trees with n leaves: a Catalan number of derivations, which share every factor.
    world = small("catalan")
    for n in (1, 2, 5, 30):
        trees = special.comb(2 * n - 2, n - 1, exact=True) / n
        expected = np.log(trees) + (n - 1) * np.log(0.3) + n * np.log(0.7)
        assert float(world.string_log_prob(np.zeros(n, int))) == pytest.approx(expected, abs=1e-12)
    ambiguous = list(derivations(FINITE, 4))
    assert len(ambiguous) > len(strings(FINITE, 4))


def test_sentences_of_english_agree_with_an_inside_algorithm_on_the_rules(x64):
    world = english()
    rules = world.params["rules"]
    paths = np.asarray(world.sample(jax.random.key(1), 40, 16))
    sentences = [path[: list(path).index(world.stop)] for path in paths if world.stop in path][:16]
    lengths = np.array([len(s) for s in sentences])
    assert lengths.max() >= 9
    scored = jax.jit(world.path_log_prob)
    for sentence in sentences:
        whole = np.append(sentence, world.stop)
        # One compilation for all: what follows the sentence is a second one, whose probability is divided out.
        padded = np.resize(np.concatenate([whole, ids(world, "the dog sleeps .")]), 16)
        padded[len(whole) :] = np.resize(ids(world, "the dog sleeps ."), 16 - len(whole))
        rest = np.asarray(world.next_log_probs(ids(world, "the dog sleeps .")))
        after = sum(rest[i % 4, v] for i, v in enumerate(padded[len(whole) :]))
        expected = np.log(inside(rules, text_of(world, sentence)))
        assert float(scored(padded)) - after == pytest.approx(expected, abs=1e-10)


# The law of prefixes.


def prefix_prob(language: dict[tuple[str, ...], float], stream: tuple[str, ...]) -> float:
    """P(a stream of sentences of a finite language begins so), by summing over the sentences."""
    if "." in stream:
        end = stream.index(".")
        return language.get(stream[:end], 0.0) * prefix_prob(language, stream[end + 1 :])
    return sum(p for sentence, p in language.items() if sentence[: len(stream)] == stream)


def test_prefix_law_of_a_finite_language(x64):
    world, language = small("finite"), strings(FINITE, 10)
    assert sum(language.values()) == pytest.approx(1, abs=1e-12)
    paths = np.array(list(itertools.product(range(world.vocab_size), repeat=6)))
    expected = np.array([prefix_prob(language, text_of(world, path)) for path in paths])
    assert expected.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(np.exp(np.asarray(jax.vmap(world.path_log_prob)(paths))), expected, atol=1e-13)


def test_prefix_law_in_closed_form(x64):
    """a^k goes on with an a with the probability of going on; after a b there is no choice."""
    world = small("anbn")
    a, b, stop = ids(world, "a b .")
    rows = np.exp(np.asarray(world.next_log_probs(np.array([a, a, a, b, b, b, stop, a, b, stop]))))
    expected = np.zeros((11, 3))
    expected[[0, 7, 10], a] = 1
    expected[[1, 2, 3, 8]] = np.where(np.arange(3) == a, 0.4, np.where(np.arange(3) == b, 0.6, 0))
    expected[[4, 5], b] = 1
    expected[[6, 9], stop] = 1
    np.testing.assert_allclose(rows, expected, atol=1e-14)


def test_left_recursion_of_any_depth_is_summed(x64):
    """P(a^k begins a sentence), over all binary trees of at least k leaves."""
    world = small("catalan")
    n = np.arange(1, 2000)
    log_trees = special.gammaln(2 * n - 1) - 2 * special.gammaln(n) - np.log(n)
    sizes = np.exp(log_trees + (n - 1) * np.log(0.3) + n * np.log(0.7))
    log_probs = np.asarray(world.next_log_probs(np.zeros(12, int)))
    tails = np.array([sizes[k - 1 :].sum() for k in range(1, 15)])
    np.testing.assert_allclose(np.exp(log_probs[1:, 0]), tails[1:13] / tails[:12], atol=1e-10)
    np.testing.assert_allclose(np.exp(log_probs[1:, world.stop]), sizes[:12] / tails[:12], atol=1e-10)


def test_sentences_are_independent(x64):
    world = english()
    one, two = ids(world, "the dog near a lamp sees many trees ."), ids(world, "some books which burn fall .")
    parts = world.path_log_prob(one) + world.path_log_prob(two)
    assert float(world.path_log_prob(np.concatenate([one, two]))) == pytest.approx(float(parts), abs=1e-12)
    assert float(world.string_log_prob(one[:-1])) == pytest.approx(float(world.path_log_prob(one)), abs=1e-12)
    assert float(world.string_log_prob(np.concatenate([one, two[:-1]]))) == -np.inf
    assert float(world.string_log_prob(np.zeros(0, int))) == -np.inf


def test_long_and_improbable_sentences_stay_finite_in_float32():
    world = small("anbn")
    path = np.array([0] * 60 + [1] * 60 + [2])
    expected = 59 * np.log(0.4) + np.log(0.6)
    assert float(world.path_log_prob(path)) == pytest.approx(expected, rel=1e-6)
    rare = worlds.grammar({"S": [(0.1, "W S"), (0.9, "W")], "W": [(1e-6, "rare"), (1 - 1e-6, "common")]})
    expected = 40 * np.log(1e-6) + 39 * np.log(0.1) + np.log(0.9)
    assert float(rare.string_log_prob(np.zeros(40, int))) == pytest.approx(expected, rel=1e-6)


def test_a_grammar_of_single_words_is_independent_tokens():
    world = worlds.grammar({"S": [(0.3, "a"), (0.7, "b")]})
    np.testing.assert_allclose(
        np.exp(np.asarray(world.next_log_probs(np.array([1, 2])))), [[0.3, 0.7, 0], [0, 0, 1], [0.3, 0.7, 0]], atol=1e-6
    )


# Samples.


@pytest.mark.parametrize(("name", "length"), [("catalan", 4), ("long", 5), ("units", 4)])
def test_samples_follow_the_law(name, length):
    """With stacks that grow deeper than the path is long, too."""
    world, n = small(name), 20_000
    samples = np.asarray(world.sample(jax.random.key(3), n, length))
    paths = np.array(list(itertools.product(range(world.vocab_size), repeat=length)))
    probs = np.exp(np.asarray(jax.vmap(world.path_log_prob)(paths), float))
    counts = np.bincount(np.ravel_multi_index(tuple(samples.T), (world.vocab_size,) * length), minlength=len(paths))
    assert counts[probs == 0].sum() == 0
    likely = n * probs >= 5
    observed, expected = counts[likely], n * probs[likely]
    rest = n - expected.sum()
    if rest > 1e-3:
        observed, expected = np.append(observed, counts[~likely].sum()), np.append(expected, rest)
    assert stats.chisquare(observed, expected * n / expected.sum()).pvalue > 1e-3


# English.


@pytest.mark.parametrize(
    ("sentence", "possible"),
    [
        ("the dogs near the girl sleep .", True),
        ("the dogs near the girl sleeps .", False),
        ("every sleeps", False),
        ("a lamp which shines falls .", True),
        ("a lamp who shines falls .", False),
        ("a lamp sleeps .", False),
        ("the girl who sees the trees which fall near a lamp waits .", True),
        ("these small small red stones are strange .", True),
        (". the dog sleeps", False),
    ],
)
def test_english_agrees_in_number_and_in_kind(sentence, possible):
    world = english()
    path = np.zeros(16, int)
    words = ids(world, sentence)
    path[: len(words)] = words
    rows = np.asarray(world.next_log_probs(path))[np.arange(len(words)), words]
    assert np.isfinite(rows).all() == possible


def test_categories_name_the_words_that_are_alike():
    world = english()
    assert world.vocab_size == 53
    assert world.symbols[world.stop] == "."
    assert len(world.categories) == 18
    named = {name: text_of(world, members) for name, members in world.categories.items()}
    assert named["Noun_animate_singular"] == ("dog", "cat", "girl", "teacher")
    assert [name for name, words in named.items() if "the" in words] == ["Determiner_singular", "Determiner_plural"]
    everything = set().union(*world.categories.values())
    assert everything == set(range(world.vocab_size)) - {world.stop}
    assert dict(small("long").categories) == {}  # X is no category: it has a rule that is no word
    assert dict(small("anbn").categories) == {}


# Refusals.


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "expected a mapping from nonterminals to their expansions"),
        ({"S": [(0.5, "a"), (0.4, "b")]}, r"rules\['S'\]: expected probabilities that sum to 1, got 0.9. Divide"),
        ({"S": [(1.5, "a"), (-0.5, "b")]}, "expected probabilities above 0, up to 1, got 1.5"),
        ({"S": [(1.0, "Nuon a")], "Noun": [(1.0, "b")]}, "unknown nonterminal 'Nuon'. Did you mean 'Noun'"),
        ({"S": [(0.5, "a S"), (0.5, "")]}, "expected at least one symbol on the right-hand side, got none.*empty"),
        ({"S": [(0.6, "S S"), (0.4, "a")]}, r"end with probability 1.*grows by 1\.2 a generation.*from 'S'"),
        ({"S": [(0.5, "S S"), (0.5, "a")]}, r"grows by 1 a generation \(must be below 1\)"),
        ({"S": [(1.0, "A")], "A": [(1.0, "B")], "B": [(1.0, "A")]}, "grows by 1 a generation"),
        ({"S": [(1.0, "a")], "X": [(1.0, "b")]}, "got X, which cannot be reached from 'S'"),
        ({"T": [(1.0, "a")]}, "start: unknown nonterminal 'S'"),
        ({"s": [(1.0, "a")]}, "begin with a capital letter, got 's'"),
        ({"S": [(1.0, "a .")]}, r"stop: expected a token that is no word, got '\.'"),
        ({"S": "a b"}, "expected a list of pairs"),
        ({"S": [(1.0, ["a", "b"])]}, r"expected a pair \(probability, 'right-hand side'\), got"),
        ({"S": ["a b"]}, r"expected a pair \(probability, 'right-hand side'\), got 'a b'"),
    ],
)
def test_rules_that_are_no_grammar_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        worlds.grammar(rules)


def test_another_start_and_stop():
    world = worlds.grammar({"Word": [(1.0, "a")]}, start="Word", stop="END")
    assert world.symbols == ("a", "END")
    with pytest.raises(ValueError, match="stop: expected a token without whitespace, got 'the end'"):
        worlds.grammar({"S": [(1.0, "a")]}, stop="the end")


# Where worlds are used.


@pytest.mark.slow
def test_analyses_take_a_world_without_beliefs():
    world = worlds.grammar(ANBN)
    model = model_of(vocab_size=3, max_length=8, depth=1)
    subject = Subject(model=model, untrained=model_of(seed=3, vocab_size=3, max_length=8, depth=1), world=world)
    with pytest.raises(NotApplicable, match="no belief states: only hidden Markov worlds do"):
        analyses.belief_geometry.analyse(subject)
    narrowing = analyses.narrowing.analyse(subject, paths=32, contexts=16)
    assert "mean over the same paths" in narrowing.conventions["loss"]
    law = analyses.path_law.analyse(subject, paths=32, enumerated=81, samples=100)
    assert law.measured["excess_loss"] > 0
    assert law.measured["total_mass"] == pytest.approx(1, abs=1e-5)
    prompt = analyses.prompt.analyse(
        Subject(model=model, world=world, prompt=np.array([0, 0])), steps=3, k=2, samples=2, budget=8
    )
    # a a: two nested at least, so an a with probability 0.4; then b, b and the stop, or deeper.
    assert prompt.null["prompt_log_prob.world"] == pytest.approx(np.log(0.4), abs=1e-5)
    assert "grammar(rules=" in subject.facts()["data"]
    assert len(subject.facts()["data"]) < 200


@pytest.mark.parametrize("name", ["grammar", "associative_recall", "induction"])
def test_training_resolves_and_evaluates_on_every_kind_of_world(name):
    params = {"rules": {k: [list(o) for o in v] for k, v in ANBN.items()}} if name == "grammar" else {}
    world = worlds.make(name, **params)
    model = model_of(vocab_size=world.vocab_size, max_length=6, depth=1)
    config = TrainConfig(
        name="test",
        data=WorldData(name, params),
        model=jw.ModelConfig(vocab_size=world.vocab_size, max_length=6, width=16, depth=1),
        checkpoint=CheckpointConfig(),
        batch_size=16,
        eval_batches=1,
        steps=10,
    )
    assert training.resolve(config).data.params == world.params
    evaluate = training.make_evaluation(
        config, training.make_batches(config), training.make_mesh(config.mesh), jax.tree.structure(model)
    )
    assert evaluate(jax.tree.leaves(model))["excess_loss"] > 0
    assert jnp.isfinite(evaluate(jax.tree.leaves(model))["eval_loss"])
