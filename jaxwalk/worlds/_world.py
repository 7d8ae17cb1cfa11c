"""What every world is: an exactly known law over paths, and samples from it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Int32


class World:
    """A world whose path law is known exactly; its methods are pure functions, written for one path.

    `jax.vmap(world.path_log_prob)(tokens)` for many paths. The object is immutable and compared by identity;
    to jax it is a constant without leaves, so it may be closed over or passed as an argument under `jit`.

    Attributes: `vocab_size` V, `symbols` (V strings), `name` and `params` (the world's function and its
    arguments, where it came from one: `worlds.make(name, **params)` rebuilds it).

    A kind of world defines `_laws(tokens)`, the next-step laws of a path of valid tokens, [T] -> [T+1,V], and
    `_sample(key, n, length)`. What `_laws` says after an impossible token does not matter. Everything else follows.
    """

    name: str | None
    params: Mapping[str, Any]
    symbols: tuple[str, ...]
    vocab_size: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        jax.tree_util.register_static(cls)

    def __init__(
        self,
        vocab_size: int,
        symbols: Sequence[str] | None = None,
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """A world of `vocab_size` tokens; `symbols` are these as text, by default "0", "1", ...

        Raises ValueError unless there are as many symbols as tokens, all different.
        """
        self.vocab_size = vocab_size
        self.symbols = tuple(str(v) for v in range(vocab_size)) if symbols is None else tuple(symbols)
        if len(set(self.symbols)) != vocab_size or len(self.symbols) != vocab_size:
            raise ValueError(
                f"symbols: expected {vocab_size} different ones, got {list(self.symbols)}. Name every token once."
            )
        self.name = name
        self.params = MappingProxyType(dict(params or {}))

    def __str__(self) -> str:
        # A table or a grammar would fill a page.
        shown = {k: v if len(v) <= 60 else f"{v[:57]}..." for k, v in ((k, repr(v)) for k, v in self.params.items())}
        arguments = ", ".join(f"{k}={v}" for k, v in shown.items())
        return f"{self.name}({arguments})" if self.name else type(self).__name__

    def __repr__(self) -> str:
        return f"<{self}: {self.vocab_size} tokens>"

    def path_log_prob(self, tokens: Int[ArrayLike, " T"], given: int = 0) -> Float[Array, ""]:
        """log P(tokens[given:] | tokens[:given]) in nats; -inf where `tokens` is impossible.

        Raises ValueError for token ids out of range and for `given` outside 0..T; traced token ids out of range
        give NaN.
        """
        tokens = self._tokens(tokens)
        self._check_given(tokens, given)
        return _path_log_prob(self, tokens, given)

    def next_log_probs(self, tokens: Int[ArrayLike, " T"]) -> Float[Array, "T+1 V"]:
        """Row t is log p(. | first t tokens) in nats, -inf for impossible tokens; row 0 is the first token's law.

        From where the path became impossible on, rows are NaN. Token ids out of range: as in `path_log_prob`.
        """
        return _next_log_probs(self, self._tokens(tokens))

    def sample(self, key: Array, n: int, length: int) -> Int32[Array, "n length"]:
        """`n` independent paths of `length` tokens, exact up to the resolution of a uniform float (2^-23 in float32).

        `key` may be traced, `n` and `length` may not: this can be part of a jitted training step. Raises ValueError
        for negative ones.
        """
        for what, value in {"n": n, "length": length}.items():
            if value < 0:
                raise ValueError(f"{what}: expected at least 0, got {value}. Pass the number of what to sample.")
        return self._sample(key, n, length)

    # What a kind of world defines.

    def _laws(self, tokens: Int32[Array, " T"]) -> Float[Array, "T+1 V"]:
        """Row t is log p(. | first t tokens) in nats. Traced."""
        raise NotImplementedError(f"{type(self).__name__}: define `_laws`.")

    def _sample(self, key: Array, n: int, length: int) -> Int32[Array, "n length"]:
        """As in `sample`, of checked arguments."""
        raise NotImplementedError(f"{type(self).__name__}: define `_sample`.")

    # Arguments.

    def _tokens(self, tokens: ArrayLike) -> Array:
        """`tokens` as int32 ids of one path. Raises ValueError for all that can be seen to be none."""
        if isinstance(tokens, jax.core.Tracer):
            shape, kind = tokens.shape, tokens.dtype
        else:
            tokens = np.asarray(tokens)
            tokens = tokens.astype(np.int32) if tokens.size == 0 else tokens
            shape, kind = tokens.shape, tokens.dtype
        if len(shape) != 1:
            raise ValueError(
                f"tokens: expected one path of shape [T], got shape {list(shape)}. Use jax.vmap for a batch of paths."
            )
        if not jnp.issubdtype(kind, jnp.integer):
            raise ValueError(f"tokens: expected integer token ids, got {kind}. Convert them with .astype(int).")
        if isinstance(tokens, np.ndarray):
            wrong = np.unique(tokens[(tokens < 0) | (tokens >= self.vocab_size)])
            if len(wrong):
                raise ValueError(
                    f"tokens: expected ids 0 to {self.vocab_size - 1}, got {', '.join(map(str, wrong[:5]))}"
                    f"{', ...' if len(wrong) > 5 else ''}. Encode the path with this world's symbols."
                )
        return jnp.asarray(tokens, jnp.int32)

    @staticmethod
    def _check_given(tokens: Array, given: int) -> None:
        if not 0 <= given <= len(tokens):
            raise ValueError(f"given: expected 0 to {len(tokens)}, the number of tokens, got {given}. Pass fewer.")


def precise_sum(x: Float[Array, " T"]) -> Float[Array, ""]:
    """The sum of x [T], compensated (Neumaier): float32 would lose 1e-4 on a thousand log-probabilities."""

    def add(carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], None]:
        total, lost = carry
        new = total + x
        lost += jnp.where(jnp.abs(total) >= jnp.abs(x), (total - new) + x, (x - new) + total)
        return (new, lost), None

    (total, lost), _ = jax.lax.scan(add, (jnp.zeros((), x.dtype), jnp.zeros((), x.dtype)), x)
    return total + lost


def _valid(world: World, tokens: Array) -> Array:
    return (tokens >= 0) & (tokens < world.vocab_size)


@jax.jit
def _next_log_probs(world: World, tokens: Array) -> Array:
    valid = _valid(world, tokens)
    tokens = jnp.where(valid, tokens, 0)
    laws = world._laws(tokens)
    possible = valid & ~jnp.isneginf(laws[jnp.arange(len(tokens)), tokens])
    before = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(possible).astype(bool)])
    return jnp.where(before[:, None], laws, jnp.nan)


@jax.jit
def _path_log_prob(world: World, tokens: Array, given: Array) -> Array:
    valid = _valid(world, tokens)
    tokens = jnp.where(valid, tokens, 0)
    steps = _next_log_probs(world, tokens)[jnp.arange(len(tokens)), tokens]
    scored = (jnp.arange(len(tokens)) >= given) & jnp.isfinite(steps)
    total = jnp.where(jnp.isneginf(steps).any(), -jnp.inf, precise_sum(jnp.where(scored, steps, 0)))
    return jnp.where(valid.all(), total, jnp.nan)
