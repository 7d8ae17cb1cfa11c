"""Copying, parity and brackets: held to enumerations of what generates them, in exact fractions and without jax."""

import functools
import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest
from scipy import stats

from jaxwalk import analyses, text, worlds
from jaxwalk.analyses import Subject

from .conftest import model_of

HALF = Fraction(1, 2)


def copies(length, letters, string, delay):
    """(probability, path) of all paths, by what is drawn. The tokens: letters, wait, go."""
    cycles = -(-length // (2 * string + delay + 1))
    for drawn in itertools.product(range(letters), repeat=cycles * string):
        path = ()
        for c in range(cycles):
            word = drawn[c * string : (c + 1) * string]
            path += (*word, *[letters] * delay, letters + 1, *word)
        yield Fraction(1, letters ** len(drawn)), path[:length]


def parities(length, block, p):
    """The same, over where in a block the path starts and all bits from that block's first."""
    for start in range(block + 1):
        blocks = -(-(start + length) // (block + 1))
        for bits in itertools.product((0, 1), repeat=blocks * block):
            cut = [bits[i : i + block] for i in range(0, len(bits), block)]
            path = [token for of in cut for token in (*of, sum(of) % 2)]
            prob = np.prod([Fraction(1, block + 1), *(1 - p if bit else p for bit in bits)])
            yield prob, tuple(path[start : start + length])


def brackets(length, kinds, depth, p):
    """The same, over all choices of opening and closing, with the string rewritten until nothing is left to match."""
    for path in itertools.product(range(2 * kinds), repeat=length):
        prob, opened = Fraction(1), ""
        for token in path:
            before, opened = opened, opened + chr(token)
            for kind in range(kinds):
                opened = opened.replace(chr(kind) + chr(kinds + kind), "")
            wrong = any(ord(c) >= kinds for c in opened) or len(opened) > depth
            opens = 1 if not before else 0 if len(before) == depth else p
            prob *= 0 if wrong else Fraction(opens) / kinds if token < kinds else 1 - opens
        yield prob, path


CASES = {
    "copy": (worlds.copy_after_delay, copies, 9, {"letters": 2, "string": 2, "delay": 1}),
    "copy at once": (worlds.copy_after_delay, copies, 7, {"letters": 3, "string": 2, "delay": 0}),
    "copy of one": (worlds.copy_after_delay, copies, 8, {"letters": 3, "string": 1, "delay": 2}),
    "parity": (worlds.parity, parities, 8, {"block": 3, "p": Fraction(1, 4)}),
    "parity of one": (worlds.parity, parities, 6, {"block": 1, "p": Fraction(1, 3)}),
    "dyck": (worlds.dyck, brackets, 6, {"kinds": 2, "depth": 2, "p": Fraction(1, 4)}),
    "dyck of one kind": (worlds.dyck, brackets, 8, {"kinds": 1, "depth": 3, "p": HALF}),
    "dyck of depth 1": (worlds.dyck, brackets, 4, {"kinds": 3, "depth": 1, "p": HALF}),
}
each = pytest.mark.parametrize("case", CASES)


@functools.cache
def world_of(case):
    make, _, length, params = CASES[case]
    return make(**{k: float(v) if k == "p" else v for k, v in params.items()}), length


@functools.cache
def expected_of(case):
    """The law of all possible paths of a length."""
    _, generated, length, params = CASES[case]
    law = {}
    for prob, path in generated(length, **params):
        law[path] = law.get(path, 0) + prob
    assert sum(law.values()) == 1
    return {path: float(prob) for path, prob in law.items() if prob}


@each
def test_the_law_is_that_of_what_generates_it(case, x64):
    world, length = world_of(case)
    law = expected_of(case)
    possible = np.array(list(law))
    got = np.exp(np.asarray(jax.jit(jax.vmap(world.path_log_prob))(possible)))
    np.testing.assert_allclose(got, list(law.values()), rtol=1e-12)
    # As many of the others as there are, or as can be drawn.
    others = np.random.default_rng(0).integers(0, world.vocab_size, (2000, length))
    changed = np.repeat(possible, 20, axis=0)[:4000]
    places = np.arange(len(changed)) % length
    changed[np.arange(len(changed)), places] = others.ravel()[: len(changed)]
    others = np.array([path for path in np.concatenate([others, changed]) if tuple(path) not in law])
    assert len(others) > 100
    assert np.isneginf(jax.jit(jax.vmap(world.path_log_prob))(others)).all()


@each
def test_the_next_step_is_that_of_the_paths(case, x64):
    """At every position of every possible path, and never a token that could not come."""
    world, length = world_of(case)
    law = expected_of(case)
    begins = {}
    for path, prob in law.items():
        for t in range(length + 1):
            begins[path[:t]] = begins.get(path[:t], 0) + prob
    paths = list(law)[:: max(1, len(law) // 50)]
    steps = np.exp(np.asarray(jax.jit(jax.vmap(world.next_log_probs))(np.array(paths))))
    np.testing.assert_allclose(steps.sum(-1), 1, atol=1e-12)
    for path, rows in zip(paths, steps, strict=True):
        for t in range(length):
            expected = [begins.get((*path[:t], v), 0) / begins[path[:t]] for v in range(world.vocab_size)]
            np.testing.assert_allclose(rows[t], expected, atol=1e-12)


@each
def test_samples_follow_the_law(case):
    world, length = world_of(case)
    n, law = 20_000, expected_of(case)
    drawn, times = np.unique(np.asarray(world.sample(jax.random.key(5), n, length)), axis=0, return_counts=True)
    counts = dict(zip(map(tuple, drawn.tolist()), times, strict=True))
    assert counts.keys() <= law.keys()
    observed = np.array([counts.get(path, 0) for path in law])
    wanted = n * np.array(list(law.values()))
    likely = wanted >= 5
    observed = np.append(observed[likely], observed[~likely].sum())
    wanted = np.append(wanted[likely], wanted[~likely].sum())
    observed, wanted = observed[wanted > 1e-6], wanted[wanted > 1e-6]
    assert stats.chisquare(observed, wanted * n / wanted.sum()).pvalue > 1e-3


# What is special to each.


def test_a_cycle_of_copying_costs_its_letters():
    world = worlds.copy_after_delay(letters=5, string=3, delay=7)
    cycle = 2 * 3 + 7 + 1
    path = np.asarray(world.sample(jax.random.key(0), 1, 3 * cycle))[0]
    for t in (3, cycle - 1, cycle, 3 * cycle):
        letters = 3 * (t // cycle) + min(3, t % cycle)
        assert float(world.path_log_prob(path[:t])) == pytest.approx(-letters * np.log(5), rel=1e-6)
    np.testing.assert_array_equal(path[cycle - 3 : cycle], path[:3])
    assert [world.symbols[v] for v in path[3:11]] == ["wait"] * 7 + ["go"]
    assert (path[cycle : cycle + 3] != path[:3]).any()


def test_parity_of_two_bits_is_rrxor():
    paths = np.array(list(itertools.product((0, 1), repeat=7)))
    two, rrxor = worlds.parity(2, 0.3), worlds.rrxor(0.3, 0.3)
    np.testing.assert_allclose(
        *(jax.jit(jax.vmap(lambda t, w=w: jax.numpy.exp(w.path_log_prob(t))))(paths) for w in (two, rrxor)), atol=1e-6
    )
    assert two.num_states == rrxor.num_states == 5


@pytest.mark.parametrize(("block", "p"), [(1, 0.5), (4, 0.5), (5, 0.2)])
def test_entropy_rate_of_parity(block, p):
    expected = block * stats.entropy([p, 1 - p]) / (block + 1)
    assert float(worlds.parity(block, p).entropy_rate()) == pytest.approx(expected, abs=1e-6)


def test_a_part_of_a_block_says_nothing_of_its_parity():
    """All bits but one, whichever is left out, and the parity is a coin still: by summing over that bit."""
    world = worlds.parity(4)
    known = world.transitions
    for missing in range(4):
        for bits in itertools.product((0, 1), repeat=3):
            belief = np.eye(world.num_states)[0]
            for place in range(4):
                bit = bits[place - (place > missing)] if place != missing else None
                belief = belief @ (known.sum(0) if bit is None else known[bit])
            law = belief @ known.sum(2).T
            np.testing.assert_allclose(law / law.sum(), 0.5)


def test_beliefs_in_brackets_are_the_stack(x64):
    world = worlds.dyck(kinds=2, depth=3)
    path = np.array([0, 1, 3, 0, 1, 3, 2, 2, 1])  # (0 (1 1) (0 (1 1) 0) 0) (1
    beliefs = np.asarray(world.beliefs(path))
    np.testing.assert_allclose(beliefs.max(1), 1)
    states = beliefs.argmax(1)
    # Equal where the stack is, and only there.
    stacks = ["", "0", "01", "0", "00", "001", "00", "0", "", "1"]
    for i, j in itertools.combinations(range(len(stacks)), 2):
        assert (states[i] == states[j]) == (stacks[i] == stacks[j])
    assert world.num_states == 15
    text_of = text.SymbolVocabulary(world.symbols)
    assert text_of.decode(path[:3]).replace(" ", "") == "(0(11)"
    many = worlds.dyck(kinds=12, depth=1)
    vocabulary = text.SymbolVocabulary(many.symbols)
    matched = np.asarray(many.sample(jax.random.key(0), 1, 30))[0]
    np.testing.assert_array_equal(vocabulary.encode(vocabulary.decode(matched)), matched)


def test_which_kind_closes_is_certain_and_whether_is_not():
    """Uncertain are the kinds of half the tokens, and wherever it may, whether one opens or closes."""
    world = worlds.dyck(kinds=3, depth=2, p=0.3)
    # From empty: opens for sure. At depth 1: opens with 0.3. At depth 2: closes. Empty half the time it is even.
    losses = np.asarray(world.ideal_loss(41))
    assert losses[0] == pytest.approx(np.log(3), abs=1e-6)
    assert losses[1] == pytest.approx(stats.entropy([0.7, 0.1, 0.1, 0.1]), abs=1e-6)
    # In the long run an even position is empty with 0.7, and full with 0.3.
    even = 0.7 * np.log(3)
    assert losses[40] == pytest.approx(even, abs=1e-6)
    assert float(world.entropy_rate()) == pytest.approx((even + stats.entropy([0.7, 0.1, 0.1, 0.1])) / 2, abs=1e-6)


def test_belief_geometry_takes_brackets_and_parity():
    for world in (worlds.dyck(kinds=2, depth=2), worlds.parity(block=2)):
        model, untrained = (model_of(seed=s, vocab_size=world.vocab_size, max_length=8, depth=1) for s in (0, 3))
        found = analyses.belief_geometry.analyse(Subject(model=model, untrained=untrained, world=world))
        assert np.isfinite(found.measured["r2"])


# Refusals.


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "copy_after_delay",
            {"string": 0},
            "letters >= 1, string >= 1 and delay >= 0, got letters=8, string=0, delay=8",
        ),
        ("copy_after_delay", {"delay": -1}, "delay >= 0, got .*delay=-1"),
        ("copy_after_delay", {"letter": 3}, "Did you mean 'letters'"),
        ("parity", {"block": 0}, "block >= 1 and 0 < p < 1, got block=0, p=0.5"),
        ("parity", {"p": 1.0}, "got block=4, p=1.0"),
        ("parity", {"blocks": 2}, "Did you mean 'block'"),
        ("dyck", {"kinds": 0}, "kinds >= 1, depth >= 1 and 0 < p < 1, got kinds=0, depth=4, p=0.5"),
        ("dyck", {"p": 0.0}, "got kinds=2, depth=4, p=0.0"),
        ("dyck", {"kinds": 8, "depth": 5}, r"at most 67108864 matrix entries.*got kinds=8, depth=5"),
        ("dyck", {"kind": 3}, "Did you mean 'kinds'"),
    ],
)
def test_what_is_no_world_is_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        worlds.make(name, **params)
