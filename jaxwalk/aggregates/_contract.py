"""The contract of an aggregate, and the conventions of document segments that all of them share."""

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

State = Any
"""What an aggregate carries from step to step: a pytree of arrays of fixed shape."""


class NoMixingError(TypeError):
    """An aggregate was asked for a mixing matrix that it does not have."""


class History(NamedTuple):
    """The inputs so far, [N, D]: the state of an aggregate that gives none of its own."""

    x: Float[Array, "N D"]
    position: Int[Array, ""]


class Aggregate(nnx.Module, abc.ABC):
    """A causal combination across positions: y_i = sum over j <= i of A_ij v_j, then a readout.

    The values v are made by a filter, the mixing matrix A by an association of positions. G is the number of
    heads or channels that have an A of their own. Laws, which the tests hold every aggregate to:
    `readout(mixing(x) @ values(x), x)` equals `__call__(x)` equals the steps one by one; a position depends on
    none after it; nothing crosses a border of segments; a prefix gives the prefix of the output; held, it is affine.

    An implementation declares `granularity` and `kind` and gives `values`, `mixing` and `readout`. It gives
    `__call__` where it has a faster parallel form, and `init_state`, `prefill` and `step` where it needs less than all
    inputs to go on. One of kind "none" gives these four instead, and has no held decomposition.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]]
    """What has an A of its own: a head, whose K channels of values share it; a channel, so that K = 1; or an element of
    the state, where a channel is the sum of several."""
    kind: ClassVar[Literal["exact", "conditional", "none"]]
    """What A says. exact: y = A v where v_j is a function of position j alone, so that A is all that passes between
    positions. conditional: y = A v holds, but v_j itself depends on positions before j, as where the gates of a
    recurrent network read its past. none: there is no such A."""
    undecayed: ClassVar[frozenset[str]] = frozenset()
    """Names of its fields that weight decay leaves alone though they are matrices, as it does all vectors: rates."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Names of the `Linear` fields that the stream is read by, if it is read in no other way: what turns with the space
    where that is rotated. None where it is read coordinate by coordinate."""
    writes: ClassVar[frozenset[str]] = frozenset({"out"})
    """Names of the `Linear` fields that write to the stream."""
    width: int
    """The width of the model: a field or property, which the state of `init_state` here is made from."""

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        """What is combined. With `hold`, its data-dependent coefficients are constants.

        Segments matter to conditional values alone.
        """
        raise self._none("values")

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        """A, or the stated rows of it."""
        raise self._none("mixing matrix")

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        """From the combined values to the width of the model, position by position."""
        raise self._none("readout")

    def _none(self, what: str) -> NoMixingError:
        return NoMixingError(
            f"{type(self).__name__} has no {what}: it is no sum of weighted values (kind {self.kind!r}). It has the "
            "parallel form, steps, walks, gradients, sensitivities and lenses; decompositions and mixing overrides "
            "need one of kind 'exact' or 'conditional'."
        )

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        """The fast parallel form."""
        return self.apply_mixing(x, self.mixing(x, segments=segments), segments)

    def apply_mixing(
        self,
        x: Float[Array, "T D"],
        mixing: Float[Array, "G T T"],
        segments: Int[Array, " T"] | None = None,
        *,
        hold: bool = False,
    ) -> Float[Array, "T D"]:
        """The output if A were `mixing`: readout(mixing @ values(x), x)."""
        values = self.values(x, segments, hold=hold)
        return self.readout(mixing.astype(values.dtype) @ values, x, hold=hold)

    def at(
        self, x: Float[Array, "T D"], position: Int[Array, ""], segments: Int[Array, " T"] | None = None
    ) -> Float[Array, " D"]:
        """The parallel form at one position: of an exact A, that row alone."""
        if self.kind != "exact":  # conditional values are found one after the other: a row is no less work than all
            return self(x, segments)[position]
        A, values = self.mixing(x, position[None], segments), self.values(x, segments)
        return self.readout(A.astype(values.dtype) @ values, x[position][None])[0]

    def init_state(self, length: int) -> State:
        """The state before the first of at most `length` positions."""
        leaf = jax.tree.leaves(self)[0]
        return History(jnp.zeros((length, self.width), leaf.dtype), jnp.array(0))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        """The parallel form over a prefix, and the state after it, for at most `length` positions in all."""
        return self(x), History(jnp.zeros((length, x.shape[1]), x.dtype).at[: len(x)].set(x), jnp.array(len(x)))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        """The next position. Beyond the state's length the output is NaN."""
        history, position = put(state.x[None], state.position, x[None])[0], state.position
        y = self.at(history, jnp.minimum(position, len(history) - 1))
        return History(history, position + 1), jnp.where(position < len(history), y, jnp.nan)

    def state_size(self, length: int) -> int:
        """How many numbers are carried from step to step after `length` positions, counts of positions aside."""
        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: self.init_state(length))) if a.ndim)

    def plain(self) -> "Aggregate":
        """The same function without fused kernels, which have no forward-mode derivative."""
        return self


def runs_and_positions(segments: Int[Array, " T"] | None, length: int) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """For each position, which run of equal segment ids it is in, and its position in that run, from 0.

    A run is what must not leak: an id that comes back after another one is a new document.
    """
    index = jnp.arange(length)
    if segments is None:
        return jnp.zeros(length, index.dtype), index
    border = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    start = jax.lax.cummax(jnp.where(border, index, 0))
    return jnp.cumsum(border) - 1, index - start


def causal_mask(
    rows: Int[Array, " R"], columns: Int[Array, " C"], runs: Int[Array, " T"] | None = None, window: int | None = None
) -> Bool[Array, "R C"]:
    """Where a row may look: at columns not after it, in its own run, fewer than `window` positions back."""
    allowed = columns[None, :] <= rows[:, None]
    if window is not None:
        allowed &= rows[:, None] - columns[None, :] < window
    if runs is not None:
        allowed &= runs[rows][:, None] == runs[columns][None, :]
    return allowed


def put(cache: Float[Array, "G N K"], slot: Int[Array, ""], value: Float[Array, "G K"]) -> Float[Array, "G N K"]:
    """`cache` with `value` written at `slot`; unchanged where there is no such slot."""
    return cache.at[:, slot].set(value, mode="drop", wrap_negative_indices=False)
