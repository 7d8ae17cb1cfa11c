"""Checks of the arguments of functions of a model, and padding of paths to one of a few lengths.

Invalid concrete arguments raise ValueError. As traced ones cannot, a traced id or index that is out of range gives NaN
from its position on.

A function that is called eagerly with paths of many lengths would be compiled for each of them. As models are causal,
padding on the right does not change the results before it, so eager calls pad the path to one of a few lengths and
truncate the results. Calls with traced arguments, which are part of a larger program, use the exact length.

Concrete arguments stay on the host until a compiled program uses them, as each separate transfer would compile a
program.
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
"""The smallest padded length."""


@runtime_checkable
class Limits(Protocol):
    """The limits of a model that its inputs are checked against."""

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary, V."""
        ...

    @property
    def max_length(self) -> int:
        """The length of the longest path that the model can walk."""
        ...

    @property
    def position_rows(self) -> int | None:
        """The number of rows of the learned position table, which bounds the length of a document, or None."""
        ...


def is_traced(*trees: Any) -> bool:
    """Whether any leaf of any of `trees` is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


# Checks.


def check_tokens(model: Limits, tokens: Tokens, longest: int | None = None) -> Any:
    """Check that `tokens` is a path of the model. Of traced tokens, only the shape and the type are checked.

    Args:
        model: the model.
        tokens: [T], token ids.
        longest: the maximum length; by default the model's max_length.

    Returns:
        [T], in int32; a numpy array unless traced.

    Raises:
        ValueError: if `tokens` is not a vector of at least one integer, is too long, or has ids out of range.
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
        return _to_int32(tokens)
    ids = np.asarray(tokens)
    invalid = ids[(ids < 0) | (ids >= model.vocab_size)]
    if invalid.size:
        raise ValueError(
            f"tokens: expected ids from 0 to {model.vocab_size - 1}, got {', '.join(map(str, invalid[:5]))}"
            f"{', ...' if invalid.size > 5 else ''}. Encode with the vocabulary that the model was trained with."
        )
    return ids.astype(np.int32)


def check_token(model: Limits, token: Index) -> Any:
    """Check a single id, and convert it to an int32 scalar.

    Raises:
        ValueError: if it is not an integer, or out of range.
    """
    if isinstance(token, jax.core.Tracer):
        return _to_int32(token)
    check_tokens(model, np.asarray(token)[None], longest=1)
    return np.int32(np.asarray(token))


def check_segments(segments: Segments | None, length: int) -> Any:
    """Check `segments`, unless None, and convert it to int32; to a numpy array unless traced.

    Raises:
        ValueError: if `segments` is not a vector of `length` non-negative integers.
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
        return _to_int32(segments)
    ids = np.asarray(segments)
    if (ids < 0).any():
        raise ValueError(f"segments: expected documents counted from 1, and 0 for padding, got {ids.min()}.")
    return ids.astype(np.int32)


def _to_int32(values: Array) -> Array:
    """`values` in int32: signed, as -1 marks an id as missing, and saturated, as an id out of range must stay so."""
    target, source = jnp.iinfo(jnp.int32), jnp.iinfo(values.dtype)
    if source.max > target.max:
        values = jnp.clip(values, max(source.min, target.min), target.max)
    return values.astype(jnp.int32)


def check_shape(name: str, array: Any, expected: tuple[int | None, ...]) -> None:
    """Check the shape of an argument, which could otherwise broadcast silently.

    Args:
        name: the name of the argument, for the error message.
        array: the argument; None is accepted.
        expected: the expected shape, with None for any size.

    Raises:
        ValueError: if the shape differs.
    """
    if array is None:
        return
    shape = jnp.shape(array)
    if len(shape) != len(expected) or any(e not in (None, n) for n, e in zip(shape, expected, strict=True)):
        readable = str(expected).replace("None", "any")
        raise ValueError(f"{name}: expected shape {readable} for this path, got {shape}.")


def check_index(name: str, index: Index, size: int, *, from_end: bool = True) -> Any:
    """Check an index, and convert it to a non-negative int32 scalar.

    Args:
        name: the name of the argument, for the error message.
        index: the index.
        size: the size of what it indexes.
        from_end: whether negative indices count from the end.

    Returns:
        The index. A traced index that is out of range becomes -1, for which `row` gives NaN.

    Raises:
        ValueError: if the index is not an integer, or out of range.
    """
    least = -size if from_end else 0
    if not isinstance(index, jax.core.Tracer):
        value = np.asarray(index)
        if value.ndim or not np.issubdtype(value.dtype, np.integer):
            raise ValueError(f"{name}: expected an integer, got {index!r}.")
        if not least <= value < size:
            raise ValueError(f"{name}: expected one from {least} to {size - 1}, got {value}.")
        return np.int32(value % size)
    index = _to_int32(index)
    return jnp.where((index >= least) & (index < size), index % size, -1)


def check_given(given: Index, length: int) -> Any:
    """Check `given`, the number of leading tokens that are conditioned on, and convert it to an int32 scalar.

    Raises:
        ValueError: if it is not an integer between 1 and `length`, the length of the path.
    """
    if isinstance(given, jax.core.Tracer):
        return _to_int32(given)
    value = np.asarray(given)
    if value.ndim or not np.issubdtype(value.dtype, np.integer) or not 1 <= value <= length:
        raise ValueError(f"given: expected an integer from 1 to {length} (the path's length), got {given!r}.")
    return np.int32(value)


# Padding.


def padded_length(length: int, longest: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`, but at most `longest`."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(length, min(size, longest))


def pad(array: Any, size: int, axis: int = 0) -> np.ndarray:
    """Pad a concrete array with zeros at the end of `axis` to `size`, on the host."""
    array = np.asarray(array)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def cut(tree: Tree, length: int, axis: int = 0) -> Tree:
    """Truncate every leaf to the first `length` entries along `axis`."""

    def cut_leaf(array: Array) -> Array:
        index = (slice(None),) * axis + (slice(length),)
        if array.shape[axis] == length:
            return array
        if not isinstance(array, jax.core.Tracer) and {d.platform for d in array.devices()} == {"cpu"}:
            return jax.device_put(np.asarray(array)[index])  # on the host, which compiles nothing
        return array[index]

    return jax.tree.map(cut_leaf, tree)


class Path(NamedTuple):
    """A checked path, possibly padded.

    Attributes:
        tokens: [N], padded with zeros.
        segments: [N], padded with zeros, or None.
        length: T, the length before padding.
    """

    tokens: Any
    segments: Any
    length: int

    @property
    def count(self) -> Any:
        """T as an argument of a compiled program that is shared by several lengths."""
        return np.int32(self.length)

    def pad(self, array: Any, axis: int = 0) -> Any:
        """Pad another argument along `axis`, like the path. None stays None."""
        return array if array is None or len(self.tokens) == self.length else pad(array, len(self.tokens), axis)

    def cut(self, tree: Tree, axis: int = 0) -> Tree:
        """Remove the padding along `axis` from a result."""
        return tree if len(self.tokens) == self.length else cut(tree, self.length, axis)


def prepare(
    model: Limits,
    tokens: Tokens,
    segments: Segments | None = None,
    *others: Any,
    longest: int | None = None,
    exact: bool = False,
) -> Path:
    """Check a path, and pad it unless it, the model or one of `others` is traced.

    Args:
        model: the model.
        tokens: [T], token ids.
        segments: [T], the document of each position, or None.
        *others: further arguments of the caller.
        longest: the maximum length; by default the model's max_length.
        exact: whether to keep the exact length in any case.

    Raises:
        ValueError: if `tokens` is not a path of the model, or `segments` is invalid.
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
