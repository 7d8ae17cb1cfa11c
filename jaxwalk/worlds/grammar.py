"""Grammar worlds: streams of sentences of a probabilistic context-free grammar with typed words."""

from collections.abc import Mapping
from typing import Any

from jaxwalk.worlds._grammar import Grammar

_WORDS = {
    "Determiner_singular": "the a this every",
    "Determiner_plural": "the some these many",
    "Adjective": "small big red strange",
    "Preposition": "near behind above",
    "Pronoun_animate": "who",
    "Pronoun_inanimate": "which",
    "Noun_animate_singular": "dog cat girl teacher",
    "Noun_animate_plural": "dogs cats girls teachers",
    "Noun_inanimate_singular": "stone lamp book tree",
    "Noun_inanimate_plural": "stones lamps books trees",
    "Verb_animate_singular": "sleeps sings waits",
    "Verb_animate_plural": "sleep sing wait",
    "Verb_inanimate_singular": "falls shines burns",
    "Verb_inanimate_plural": "fall shine burn",
    "Verb_transitive_singular": "sees likes follows",
    "Verb_transitive_plural": "see like follow",
    "Copula_singular": "is",
    "Copula_plural": "are",
}


def grammar(rules: Mapping[str, Any] | None = None, start: str = "S", stop: str = ".") -> Grammar:
    """Sentences of a grammar, drawn independently, one after another, each ended by the token `stop`.

    rules: nonterminal -> pairs (probability, right-hand side), the latter symbols separated by spaces, as in
        `{"S": [(0.4, "a S b"), (0.6, "a b")]}`. Names of nonterminals begin with a capital letter, words do not. By
        default a small grammar of English: 52 words in 18 categories, where verbs agree with their subject in number,
        some suit animate subjects only and some inanimate ones, adjectives repeat, and prepositional phrases and
        relative clauses nest (and their attachment is ambiguous).
    start: the nonterminal that is a sentence.

    Refused, with ValueError: probabilities that do not sum to 1, undefined or unreachable nonterminals, empty
    right-hand sides, and grammars whose sentences have no finite mean length. Chains and cycles of single
    nonterminals are fine.

    The law of the next token is exact: Jelinek & Lafferty 1991, Stolcke 1995 (cmp-lg/9411029). It takes time of
    order T^3 and memory of order T^2 times the number of rules in Chomsky normal form.
    """
    return Grammar(_english() if rules is None else rules, start, stop, name="grammar")


def _english() -> dict[str, list[tuple[float, str]]]:
    kinds = [f"{animacy}_{number}" for animacy in ("animate", "inanimate") for number in ("singular", "plural")]
    rules = {
        "S": [(0.25, f"NP_{kind} VP_{kind}") for kind in kinds],
        "NP": [(0.25, f"NP_{kind}") for kind in kinds],
        "PP": [(1.0, "Preposition NP")],
    }
    for kind in kinds:
        animacy, number = kind.split("_")
        rules[f"NP_{kind}"] = [
            (0.75, f"Determiner_{number} Nominal_{kind}"),
            (0.13, f"NP_{kind} PP"),
            (0.12, f"NP_{kind} Pronoun_{animacy} VP_{kind}"),
        ]
        rules[f"Nominal_{kind}"] = [(0.75, f"Noun_{kind}"), (0.25, f"Adjective Nominal_{kind}")]
        adjective = f"Copula_{number} Adjective"
        if animacy == "animate":
            transitive = f"Verb_transitive_{number} NP"
            rules[f"VP_{kind}"] = [(0.3, f"Verb_{kind}"), (0.45, transitive), (0.1, adjective), (0.15, f"VP_{kind} PP")]
        else:
            rules[f"VP_{kind}"] = [(0.5, f"Verb_{kind}"), (0.35, adjective), (0.15, f"VP_{kind} PP")]
    for category, words in _WORDS.items():
        rules[category] = [(1 / len(words.split()), word) for word in words.split()]
    return rules
