"""What functions of a model do with their arguments first: check them, and pad paths to one of a few lengths.

Concrete arguments that are impossible raise ValueError. Traced ones cannot raise: an id or an index out of range gives
NaN from that position on.

Called eagerly with paths of many lengths, a function would compile a program for each. As models are causal, padding on
the right changes nothing before it, so an eager call pads its path to the next of a few lengths and cuts the result
back. Calls with traced arguments, which are part of a larger program, use the exact length.

Concrete arguments stay on the host until a compiled program takes them: moving one by itself would compile a program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

Tree = TypeVar("Tree")
Tokens = Integer[Array, " T"] | Integer[np.ndarray, " T"] | Sequence[int]
Segments = Integer[Array, " T"] | Integer[np.ndarray, " T"]
Index = int | Integer[Array, ""] | Integer[np.ndarray, ""] | np.integer

SHORTEST = 16
"""The least length that a path is padded to."""


@runtime_checkable
class Limits(Protocol):
    """The part of a model that its inputs are checked against."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def max_length(self) -> int:
        """The longest path that the model walks."""
        ...

    @property
    def position_rows(self) -> int | None:
        """The rows of a learned table of positions, which bound the length of a document; None without a table."""
        ...


def is_traced(*trees: Any) -> bool:
    """Whether any leaf of `trees` is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


# Checks.


def check_tokens(model: Limits, tokens: Tokens, longest: int | None = None) -> Any:
    """`tokens` as an int32 array, of numpy if they are concrete.

    Raises:
        ValueError: if they cannot be a path of this model: not a vector of at least one integer, more than `longest`
            tokens (by default the model's max_length), or ids out of range. Of traced ids only the shape is checked;
            those out of range become NaN where they are walked or scored.
    """
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(
            f"tokens: expected one path, integers [T] with T >= 1, got shape {tokens.shape}. "
            "Batches are made with jax.vmap; an empty prompt has no next-step law."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: expected integer ids, got {tokens.dtype}. Encode text with the model's vocabulary.")
    longest = model.max_length if longest is None else longest
    if len(tokens) > longest:
        raise ValueError(
            f"tokens: expected at most {longest} tokens (max_length = {model.max_length}), got {len(tokens)}. "
            "Cut the path, or, for a model with no table of positions, dataclasses.replace(model, max_length=...)."
        )
    if isinstance(tokens, jax.core.Tracer):
        # An unsigned id cannot be -1, which marks an id as missing; one beyond int32 becomes negative, and so missing.
        return tokens.astype(jnp.int32)
    ids = np.asarray(tokens)
    wrong = ids[(ids < 0) | (ids >= model.vocab_size)]
    if wrong.size:
        raise ValueError(
            f"tokens: expected ids from 0 to {model.vocab_size - 1}, got {', '.join(map(str, wrong[:5]))}"
            f"{', ...' if wrong.size > 5 else ''}. Encode with the vocabulary that the model was trained with."
        )
    return ids.astype(np.int32)


def check_token(model: Limits, token: Index) -> Any:
    """One id as an int32 scalar. Raises ValueError as `check_tokens` does."""
    if isinstance(token, jax.core.Tracer):
        return token.astype(jnp.int32)
    check_tokens(model, np.asarray(token)[None], longest=1)
    return np.int32(np.asarray(token))


def check_segments(segments: Segments | None, length: int) -> Any:
    """`segments` as an int32 array, of numpy if they are concrete, or None.

    Raises:
        ValueError: unless they are `length` integers, none of them negative.
    """
    if segments is None:
        return None
    segments = segments if isinstance(segments, jax.Array) else np.asarray(segments)
    check_shape("segments", segments, (length,))
    if not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(
            f"segments: expected integers, the document of each position (0 is padding), got {segments.dtype}."
        )
    if isinstance(segments, jax.core.Tracer):
        return segments.astype(jnp.int32)
    ids = np.asarray(segments)
    if (ids < 0).any():
        raise ValueError(f"segments: expected documents counted from 1, and 0 for padding, got {ids.min()}.")
    return ids.astype(np.int32)


def check_shape(what: str, array: Any, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError for a shape that differs and could silently broadcast. None stands for any size."""
    if array is None:
        return
    shape = jnp.shape(array)
    if len(shape) != len(expected) or any(e not in (None, n) for n, e in zip(shape, expected, strict=True)):
        readable = str(expected).replace("None", "any")
        raise ValueError(f"{what}: expected shape {readable} for this path, got {shape}.")


def check_index(what: str, index: Index, size: int, *, from_end: bool = True) -> Any:
    """`index` counted from 0; negative ones are counted from the end if `from_end`.

    Raises:
        ValueError: if it is out of range. A traced index out of range becomes -1, which `row` turns into NaN.
    """
    least = -size if from_end else 0
    if not isinstance(index, jax.core.Tracer):
        number = np.asarray(index)
        if number.ndim or not np.issubdtype(number.dtype, np.integer):
            raise ValueError(f"{what}: expected an integer, got {index!r}.")
        if not least <= number < size:
            raise ValueError(f"{what}: expected one from {least} to {size - 1}, got {number}.")
        return np.int32(number % size)
    index = index.astype(jnp.int32)
    return jnp.where((index >= least) & (index < size), index % size, -1)


def check_given(given: Index, length: int) -> Any:
    """`given`, how many of a path's `length` tokens are given. Raises ValueError unless it is from 1 to `length`."""
    if isinstance(given, jax.core.Tracer):
        return given
    number = np.asarray(given)
    if number.ndim or not np.issubdtype(number.dtype, np.integer) or not 1 <= number <= length:
        raise ValueError(f"given: expected an integer from 1 to {length} (the path's length), got {given!r}.")
    return np.int32(number)


# Padding.


def padded_length(length: int, longest: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is at least `length`, but at most `longest`."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(length, min(size, longest))


def pad(array: Any, size: int, axis: int = 0) -> np.ndarray:
    """A concrete array with zeros after its end along `axis`, on the host."""
    array = np.asarray(array)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def cut(tree: Tree, length: int, axis: int = 0) -> Tree:
    """The first `length` entries along `axis` of every leaf that has more."""

    def one(array: Array) -> Array:
        index = (slice(None),) * axis + (slice(length),)
        if array.shape[axis] == length:
            return array
        if not isinstance(array, jax.core.Tracer) and {d.platform for d in array.devices()} == {"cpu"}:
            return jax.device_put(np.asarray(array)[index])  # cut on the host, which compiles nothing
        return array[index]

    return jax.tree.map(one, tree)


class Path(NamedTuple):
    """A checked path, padded if it may be.

    tokens: [N], with zeros from `length` on. segments: [N] or None, 0 from there on. length: T, what was given.
    """

    tokens: Any
    segments: Any
    length: int

    @property
    def count(self) -> Any:
        """T as an argument of a program that is shared by all lengths."""
        return np.int32(self.length)

    def pad(self, array: Any, axis: int = 0) -> Any:
        """Another argument of the path, padded like it; None stays None."""
        return array if array is None or len(self.tokens) == self.length else pad(array, len(self.tokens), axis)

    def cut(self, tree: Tree, axis: int = 0) -> Tree:
        """A result, without what belongs to the padding."""
        return tree if len(self.tokens) == self.length else cut(tree, self.length, axis)


def prepare(
    model: Limits,
    tokens: Tokens,
    segments: Segments | None = None,
    *others: Any,
    longest: int | None = None,
    exact: bool = False,
) -> Path:
    """The path, checked, and padded unless it, the model or one of `others` is traced, or `exact` says not to.

    Raises ValueError as `check_tokens` and `check_segments` do.
    """
    tokens = check_tokens(model, tokens, longest)
    T = len(tokens)
    segments = check_segments(segments, T)
    walked = T if longest is None else T - (longest - model.max_length)
    if segments is None and model.position_rows is not None and walked > model.position_rows:
        raise ValueError(
            f"positions: expected at most {model.position_rows} tokens, the rows of the table, got {walked}. A longer "
            "path needs a longer table, or a model without one (RoPE, ALiBi, sinusoidal)."
        )
    if exact or is_traced(model, tokens, segments, others):
        return Path(tokens, segments, T)
    N = padded_length(T, model.max_length if longest is None else longest)
    if N == T:
        return Path(tokens, segments, T)
    return Path(pad(tokens, N), None if segments is None else pad(segments, N), T)
