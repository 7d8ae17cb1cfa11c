"""Prefix trees of paths."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxwalk.paths.sampling import Paths


class PrefixTree(NamedTuple):
    """The distinct prefixes of a set of paths, each listed after its parent; the first is the empty prefix.

    Attributes:
        parent: [N], the index of the prefix without its last token; -1 for the empty prefix.
        token: [N], the last token; -1 for the empty prefix.
        depth: [N], the number of tokens.
        mass: [N], the total probability of the paths with this prefix.
    """

    parent: Int[np.ndarray, " N"]
    token: Int[np.ndarray, " N"]
    depth: Int[np.ndarray, " N"]
    mass: Float[np.ndarray, " N"]


def prefix_tree(paths: Paths) -> PrefixTree:
    """The prefix tree of the distinct paths in `paths`; empty entries are left out."""
    filled = np.isfinite(np.asarray(paths.log_probs))
    rows, index = np.unique(np.asarray(paths.tokens)[filled], axis=0, return_index=True)
    probs = np.exp(np.asarray(paths.log_probs, np.float64)[filled][index])
    parent, token, depth, mass = [-1], [-1], [0], [float(probs.sum())]
    above = np.zeros(len(rows), int)  # the index of each path's prefix so far
    for column in range(rows.shape[1]):
        # Rows are in lexicographic order, so the rows of one prefix are adjacent.
        new = np.any(rows[1:, : column + 1] != rows[:-1, : column + 1], axis=1)
        group = np.concatenate([[0], np.cumsum(new)]) if len(rows) else above
        first = np.unique(group, return_index=True)[1]
        start = len(parent)
        parent += above[first].tolist()
        token += rows[first, column].tolist()
        depth += [column + 1] * len(first)
        mass += np.bincount(group, probs).tolist()
        above = start + group
    return PrefixTree(np.array(parent), np.array(token), np.array(depth), np.array(mass))
