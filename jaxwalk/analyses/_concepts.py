"""Concepts: words by category and analogies, read from a file or a world, and the tokens of a vocabulary they are."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxwalk.config import ConfigError
from jaxwalk.evidence.finding import NotApplicable
from jaxwalk.evidence.subject import Subject

FILE = Path(__file__).with_name("concepts.json")
FORMAT = '{"categories": {name: [words]}, "analogies": {relation: [[a, b, c, d], ...]}}'
LEAST = 3
"""The fewest known words of a category."""
FEWEST = 8
"""The fewest words, or analogies, for whose mean an interval is computed."""
NAMED = 12
"""The most unknown words, or categories, that a message lists."""


class Concepts(NamedTuple):
    """Words by category and quadruples (a is to b as c is to d) by relation; optionally the same for characters."""

    categories: dict[str, list[str]]
    analogies: dict[str, list[list[str]]]
    characters: "Concepts | None" = None


def read_concepts(file: str | os.PathLike[str]) -> Concepts:
    """The concepts of a JSON file. Raises ConfigError, naming the place, if the file does not have the format."""
    try:
        data = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"concepts: {os.fspath(file)!r} cannot be read as JSON ({error}). Expected {FORMAT}."
        ) from error
    characters = data.pop("characters", None) if isinstance(data, dict) else None
    found = _concepts(data, os.fspath(file))
    return found if characters is None else found._replace(characters=_concepts(characters, f"{file}: characters"))


def _concepts(data: Any, where: str) -> Concepts:
    def wrong(what: str, got: Any) -> ConfigError:
        return ConfigError(f"concepts, {where}: expected {what}, got {json.dumps(got)[:60]}. The format is {FORMAT}.")

    if not isinstance(data, dict) or not isinstance(data.get("categories"), dict):
        raise wrong("an object with categories", data)
    if stray := data.keys() - {"categories", "analogies"}:
        raise wrong("categories and analogies only", sorted(stray))
    for name, words in data["categories"].items():
        if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
            raise wrong(f"category {name!r} to be a list of words", words)
    analogies = data.get("analogies", {})
    if not isinstance(analogies, dict):
        raise wrong("analogies to be an object", analogies)
    for name, rows in analogies.items():
        for row in rows if isinstance(rows, list) else [rows]:
            if not isinstance(row, list) or len(row) != 4 or not all(isinstance(w, str) and w for w in row):
                raise wrong(f"relation {name!r} to be a list of four words each", row)
    return Concepts(data["categories"], analogies)


class Known(NamedTuple):
    """The concepts whose words are single tokens of a vocabulary: C categories of W words, and Q analogies.

    Attributes:
        names: [C], the categories.
        tokens: [W], the token of each word.
        labels: [W], the category of each word.
        analogies: [Q, 4], the tokens of each quadruple.
        relation: [Q], the relation of each quadruple.
        conventions: the source of the concepts, and what was left out, for the finding.
    """

    names: tuple[str, ...]
    tokens: Int[np.ndarray, " W"]
    labels: Int[np.ndarray, " W"]
    analogies: Int[np.ndarray, "Q 4"]
    relation: Int[np.ndarray, " Q"]
    conventions: dict[str, Any]


def single_token(vocabulary: Any, word: str) -> int | None:
    """The token of `word` after a space, else that of `word` alone; None if neither is a single token."""
    for text in (f" {word}", word):
        try:
            tokens = vocabulary.encode(text)
        except ValueError:  # a symbol that the vocabulary does not have
            continue
        if len(tokens) == 1:
            return int(tokens[0])
    return None


def known_concepts(subject: Subject, file: str | os.PathLike[str] | None, most: int, rng: np.random.Generator) -> Known:
    """The concepts of `file`, else of the subject's world, else of `FILE`, that the subject's vocabulary has.

    Characters are used instead of words if too few words are single tokens.

    Args:
        subject: the subject.
        file: a file to read with `read_concepts`, or None.
        most: about how many words to keep at most.
        rng: the generator that orders the words.

    Raises:
        ConfigError: if the file does not have the format.
        NotApplicable: if there are no categories, or too few of their words are single tokens.
    """
    world, vocabulary, V = subject.world, subject.vocabulary, subject.model.vocab_size
    if file is None and world is not None:
        categories = getattr(world, "categories", None)
        if not categories:
            raise NotApplicable(f"the tokens of the world {world.name} have no categories. Give a file of concepts.")
        ids = {str(name): [int(v) for v in tokens] for name, tokens in categories.items()}
        if wrong := [v for tokens in ids.values() for v in tokens if not 0 <= v < V]:
            raise NotApplicable(f"the world's categories have the token {wrong[0]}, and the model {V} tokens")
        return _selected(ids, {}, "words", most, rng, {"concepts": f"the categories of the world {world.name}"})
    if vocabulary is None:
        raise NotApplicable("it needs categories: a world that has some, or a vocabulary in which to look words up")
    concepts, source = read_concepts(FILE if file is None else file), FILE.name if file is None else os.fspath(file)
    reasons = []
    for kind, group in (("words", concepts), ("characters", concepts.characters)):
        if group is None:
            continue
        try:
            tokens = {w: single_token(vocabulary, w) for w in _words(group)}
        except ImportError as error:
            raise NotApplicable(str(error)) from error
        listed = {w for words in group.categories.values() for w in words}
        conventions = {
            "concepts": f"{kind} of {source}"
            + ("" if kind == "words" else ", as too few of its words are single tokens"),
            "unknown": f"of {len(listed)} {kind}, with or without a space before them, are no single token, and left "
            f"out: {_listed([w for w in listed if tokens[w] is None])}",
        }
        ids = {name: [t for w in words if (t := tokens[w]) is not None] for name, words in group.categories.items()}
        known = {
            name: [quadruple for row in rows if None not in (quadruple := [tokens[w] for w in row])]
            for name, rows in group.analogies.items()
        }
        conventions["analogies"] = (
            f"{sum(map(len, known.values()))} of {sum(map(len, group.analogies.values()))} quadruples are known"
        )
        try:
            return _selected(ids, known, kind, most, rng, conventions)
        except NotApplicable as reason:
            reasons.append(str(reason))
    raise NotApplicable("; ".join(reasons))


def _words(group: Concepts) -> Iterable[str]:
    """The distinct words of a group, in a fixed order."""
    rows = [*group.categories.values(), *(row for rows in group.analogies.values() for row in rows)]
    return dict.fromkeys(word for row in rows for word in row)


def _listed(words: Iterable[str]) -> str:
    """The number of words and, in parentheses, the first `NAMED` of them."""
    words = sorted(words)
    more = ", ..." if len(words) > NAMED else ""
    return f"{len(words)} ({', '.join(words[:NAMED])}{more})" if words else "0"


def _selected(
    ids: Mapping[str, Sequence[int]],
    analogies: Mapping[str, Sequence[Sequence[Any]]],
    kind: str,
    most: int,
    rng: np.random.Generator,
    conventions: dict[str, Any],
) -> Known:
    """The words to measure, in random order: at least `LEAST` per category, about `most` in all, none ambiguous.

    `conventions` is extended in place. Raises NotApplicable if there are fewer than two categories or `FEWEST` words.
    """
    times: dict[int, int] = {}
    for tokens in ids.values():
        for token in set(tokens):
            times[token] = times.get(token, 0) + 1
    clear = {name: [t for t in dict.fromkeys(tokens) if times[t] == 1] for name, tokens in ids.items()}
    kept = {name: tokens for name, tokens in clear.items() if len(tokens) >= LEAST}
    cap = max(LEAST, most // max(len(kept), 1))
    kept = {name: tokens[:cap] for name, tokens in kept.items()}
    W = sum(map(len, kept.values()))
    if len(kept) < 2 or W < FEWEST:
        found = sorted(clear.items(), key=lambda item: -len(item[1]))[:NAMED]
        raise NotApplicable(
            f"{kind}: expected 2 categories with {LEAST} or more that are single tokens, and {FEWEST} in all, found "
            + (", ".join(f"{name} {len(tokens)}" for name, tokens in found) or "no categories")
        )
    names = tuple(kept)
    order = rng.permutation(W)  # so that ties and folds do not follow the order of the file
    conventions["categories"] = ", ".join(f"{name} {len(tokens)}" for name, tokens in kept.items())
    if left := [f"{name} {len(tokens)}" for name, tokens in clear.items() if name not in kept]:
        conventions["left_out"] = f"categories with fewer than {LEAST} known {kind}: {', '.join(left)}"
    if ambiguous := sum(n > 1 for n in times.values()):
        conventions["ambiguous"] = f"{ambiguous} {kind} are in several categories, and are left out"
    asked = sum(map(len, analogies.values()))
    relation = [r for r, rows in enumerate(analogies.values()) for _ in rows]
    quadruples = [row for rows in analogies.values() for row in rows]
    if asked < FEWEST:
        relation, quadruples = [], []
        conventions["analogies"] = (
            f"not measured: {conventions.get('analogies', 'there are none')}, {FEWEST} are needed"
        )
    return Known(
        names,
        np.concatenate([kept[name] for name in names])[order].astype(int),
        np.repeat(np.arange(len(names)), [len(kept[name]) for name in names])[order],
        np.array(quadruples, int).reshape(-1, 4),
        np.array(relation, int),
        conventions,
    )
