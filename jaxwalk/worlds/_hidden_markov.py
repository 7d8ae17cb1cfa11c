"""Hidden Markov worlds, ordinary and generalised: the path law, the observer's beliefs, and samples.

A world is token-labelled matrices T^(v) [N,N], an initial belief pi [N] and a functional w [N]:

    P(v_1..v_T) = pi T^(v_1) ... T^(v_T) w,     (sum_v T^(v)) w = w,     pi . w = 1.

Ordinary hidden Markov models are the case T >= 0, w = 1, where T^(v)[i,j] is the probability of emitting v
and moving to state j, from state i. Generalised ones (observable operator models, Jaeger 2000; general
probabilistic theories, Fanizza et al. 2209.11225) may have negative entries.

Matrices are kept in float64 (numpy) and used in jax's default float. All recursions are rescaled at every
token, so that float32 stays finite on any length.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Int32

from jaxwalk.worlds import _belief_law
from jaxwalk.worlds._world import World, precise_sum

_CHECKED_PATHS = 1 << 16  # paths enumerated, by default, in the search for a negative probability
_TOLERANCE = 1e-8  # how far a sum of probabilities may be from 1: rounding, or a typed decimal
_dot = functools.partial(jnp.einsum, precision="highest")  # accelerators would multiply float32 coarsely


class Bounds(NamedTuple):
    """Numbers, in nats, between which a quantity lies for certain; equal where it is known in closed form."""

    low: float
    high: float


class MonteCarlo(NamedTuple):
    """An estimate by sampling, in nats, and its standard error; arrays of one shape."""

    value: Array
    standard_error: Array


class HiddenMarkov(World):
    """A world of which an observer's beliefs, the ideal loss and the entropy rate are known too.

    Attributes beside those of every world: `num_states` N, `transitions` [V,N,N], `initial` [N], `functional` [N]
    (float64, read-only), `generalised`, and `checked_length`: path probabilities are known to be nonnegative up to
    this length (None: at any).
    """

    num_states: int
    transitions: np.ndarray
    initial: np.ndarray
    functional: np.ndarray
    generalised: bool
    checked_length: int | None

    def __init__(
        self,
        transitions: Any,
        initial: Any = None,
        functional: Any = None,
        symbols: Sequence[str] | None = None,
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
        check_length: int | None = None,
    ) -> None:
        """A world from its matrices, or ValueError with the reason why they are not a process.

        transitions: [V,N,N], T^(v)[i,j].
        initial: [N], the belief before the first token. By default the stationary one, which a chain that is
            not irreducible need not have: it must be given there.
        functional: [N], w. Given, the model is a generalised one, and entries may be negative. Whether such
            matrices are a process is undecidable in general: they are refused if a path of up to
            `check_length` tokens has a negative probability, and nothing is claimed beyond that length
            unless no entry is negative.
        symbols: the V tokens as text; by default "0", "1", ...
        check_length: see `functional`; by default the longest with at most 65536 paths.
        """
        matrices = _numbers("transitions", transitions)
        if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or 0 in matrices.shape:
            raise ValueError(
                f"transitions: expected shape [vocab_size, states, states], got {list(matrices.shape)}. "
                "Stack one square matrix per token."
            )
        super().__init__(matrices.shape[0], symbols, name, params)
        self.num_states = matrices.shape[1]
        self.generalised = functional is not None
        self.transitions = matrices
        self.functional = np.ones(self.num_states)
        if functional is not None:
            self.functional = _numbers("functional", functional, self.num_states)
        self._check_transitions()
        self.initial = self._stationary() if initial is None else _numbers("initial", initial, self.num_states)
        self._check_initial()
        self.checked_length = self._check_paths(check_length)
        for array in (self.transitions, self.initial, self.functional):
            array.setflags(write=False)

    def __repr__(self) -> str:
        return f"<{self}: {self.vocab_size} tokens, {self.num_states} states>"

    # What matrices must satisfy.

    def _check_transitions(self) -> None:
        negative = np.argwhere(self.transitions < 0)
        if len(negative) and not self.generalised:
            v, i, j = negative[0]
            raise ValueError(
                f"transitions: expected no negative entry, got {self.transitions[v, i, j]:.6g} at [{v},{i},{j}]. "
                "An ordinary hidden Markov model has none; for a generalised one give its `functional` w."
            )
        image = self.transitions.sum(0) @ self.functional
        off = np.abs(image - self.functional)
        i = int(np.argmax(off))
        if off[i] <= _TOLERANCE * max(1.0, float(np.abs(self.functional).max())):
            return
        if self.generalised:
            raise ValueError(
                f"functional: expected (sum over tokens of T) w = w, got {image[i]:.9g} for {self.functional[i]:.9g} "
                f"at state {i}. Pass the right eigenvector of the summed matrices at eigenvalue 1."
            )
        raise ValueError(
            f"transitions: expected the probabilities out of each state, over tokens and next states, to sum to 1, "
            f"got {image[i]:.9g} for state {i}. Divide by `transitions.sum((0, 2), keepdims=True)`, or, if the "
            "matrices belong to a generalised model, give its `functional` w."
        )

    def _stationary(self) -> np.ndarray:
        matrix = self.transitions.sum(0)
        left, _ = _belief_law.invariant(matrix)
        if self.generalised:
            if len(left) > 1 or abs(left[0] @ self.functional) < 1e-12:
                raise ValueError(
                    "initial: expected one, because the summed matrices have no unique stationary belief (eigenvalue "
                    f"1 has {len(left)} left eigenvectors, normalised by pi . w = 1), got None. Pass `initial`."
                )
            return left[0] / (left[0] @ self.functional)
        reach = np.eye(self.num_states, dtype=bool) | (matrix > 0)
        for _ in range(self.num_states.bit_length()):
            reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
        if not reach.all():
            i, j = np.argwhere(~reach)[0]
            remedy = "Pass `initial`"
            if len(left) == 1:
                law = np.round(np.abs(left[0]) / np.abs(left[0]).sum(), 6).tolist()
                remedy += f"; the stationary law, which leaves out the states it never comes back to, is {law}"
            raise ValueError(
                f"initial: expected one, because the chain is reducible (state {j} cannot be reached from state {i}) "
                f"and where it starts is a choice, got None. {remedy}."
            )
        return np.abs(left[0]) / np.abs(left[0]).sum()

    def _check_initial(self) -> None:
        total = float(self.initial @ self.functional)
        if not self.generalised and (self.initial < 0).any():
            i = int(np.argmin(self.initial))
            raise ValueError(f"initial: expected probabilities, got {self.initial[i]:.6g} for state {i}. Remove it.")
        if abs(total - 1) > _TOLERANCE:
            what = "initial . functional = 1" if self.generalised else "probabilities that sum to 1"
            raise ValueError(f"initial: expected {what}, got {total:.9g}. Divide `initial` by {total:.9g}.")

    def _check_paths(self, check_length: int | None) -> int | None:
        """The length up to which no path probability is negative; None where none can be."""
        if min(self.transitions.min(), self.initial.min(), self.functional.min()) >= 0:
            return None
        if check_length is None:
            check_length = int(np.log(_CHECKED_PATHS) / np.log(max(self.vocab_size, 2)))
        if check_length < 1:
            raise ValueError(f"check_length: expected at least 1, got {check_length}. Leave it out for the default.")
        vectors, scale = self.initial[None], float(np.abs(self.initial) @ np.abs(self.functional))
        for length in range(1, check_length + 1):
            vectors = np.einsum("pi,vij->pvj", vectors, self.transitions).reshape(-1, self.num_states)
            probs = vectors @ self.functional
            worst = int(np.argmin(probs))
            if probs[worst] < -1e-12 * max(scale, 1.0):
                path = [int(v) for v in np.unravel_index(worst, (self.vocab_size,) * length)]
                raise ValueError(
                    f"transitions: expected no negative path probability, got {probs[worst]:.6g} for the path {path}. "
                    "These matrices are not a process; correct them, `initial`, or `functional`."
                )
        return check_length

    # The path law.

    def path_log_prob(self, tokens: Int[ArrayLike, " T"], given: int = 0) -> Float[Array, ""]:
        """log P(tokens[given:] | tokens[:given]) in nats; -inf where `tokens` is impossible.

        In float32 the sum is compensated: what is left is about the rounding of the result itself, which is
        below 1e-4 up to 1000 nats. For generalised models a next token of conditional probability below a few
        rounding errors counts as impossible, since the two cannot be told apart. Raises ValueError for token
        ids out of range and for `given` outside 0..T; traced token ids out of range give NaN.
        """
        tokens = self._tokens(tokens)
        self._check_given(tokens, given)
        return _path_log_prob(self._law, tokens, given)

    def beliefs(self, tokens: Int[ArrayLike, " T"]) -> Float[Array, "T+1 N"]:
        """The observer's beliefs: row t is pi T^(v_1)..T^(v_t), scaled so that its product with w is 1.

        Row 0 is `initial`. For ordinary models a row is P(state | first t tokens). From where the path became
        impossible on, rows are NaN. Token ids out of range: as in `path_log_prob`.
        """
        return _beliefs(self._law, self._tokens(tokens))

    def next_log_probs(self, tokens: Int[ArrayLike, " T"]) -> Float[Array, "T+1 V"]:
        """Row t is log p(. | first t tokens) in nats, -inf for impossible tokens; row 0 is the first token's law.

        From where the path became impossible on, rows are NaN. Token ids out of range: as in `path_log_prob`.
        """
        return _next_log_probs(self._law, self._tokens(tokens))

    def _sample(self, key: Array, n: int, length: int) -> Int32[Array, "n length"]:
        # The states of a generalised model are not sampled: it walks its beliefs.
        if self.generalised:
            return _sample_beliefs(self._law, key, n, length)
        return _sample_states(self._outcomes, key, n, length)

    # What an observer who knows the world loses.

    def entropy_rate(self, tol: float = 1e-6) -> Float[Array, ""]:
        """Entropy rate h in nats per token, to within `tol`; see `entropy_rate_bounds` for how it is found.

        Raises ValueError where bounds `tol` apart cannot be had; `estimate_entropy_rate` always can.
        """
        low, high = self.entropy_rate_bounds(tol)
        if high - low > tol:
            raise ValueError(
                f"entropy_rate: expected bounds at most tol = {tol:g} nats apart, got [{low:.9g}, {high:.9g}]. Pass a "
                "larger tol, or take `estimate_entropy_rate(key)` with its standard error."
            )
        return jnp.asarray((low + high) / 2, float)

    def entropy_rate_bounds(self, tol: float = 1e-6, max_beliefs: int = 200_000) -> Bounds:
        """Certain bounds, in nats, on the entropy rate: float64 numbers, equal where it has a closed form.

        Closed form: unifilar models, and any model whose observer has finitely many beliefs (up to 1000).
        Else H(X_n+1 | X_1..n, S_0) <= h <= H(X_n+1 | X_1..n), with n growing until they are `tol` apart or
        the work is too much: then the bounds are wider than asked. A generalised model has no hidden state
        S_0 to condition on; its lower bound comes from tokens that reset the belief, and is 0 without any.
        """
        low, high = _belief_law.entropy_rate_bounds(
            self.transitions, self.functional, self.initial, tol, max_beliefs, not self.generalised
        )
        return Bounds(float(low), float(high))

    def estimate_entropy_rate(self, key: Array, n: int = 256, length: int = 1024, burn_in: int = 128) -> MonteCarlo:
        """Entropy rate in nats: the mean, over `n` sampled paths, of the entropy of the next token's law.

        The first `burn_in` positions are left out; what they had left to learn biases the estimate upwards,
        and the standard error, which is over paths, does not see it.
        """
        if n < 2 or not 0 <= burn_in < length:
            raise ValueError(
                f"expected n >= 2 and 0 <= burn_in < length, got n={n}, burn_in={burn_in}, length={length}. "
                "Sample more, or longer, paths."
            )
        entropies = self._sampled_entropies(key, n, length)[:, burn_in:].mean(1)
        return MonteCarlo(entropies.mean(), entropies.std(ddof=1) / np.sqrt(n))

    def ideal_loss(self, length: int, tol: float = 1e-5, max_beliefs: int = 50_000) -> Float[Array, " length"]:
        """Loss, in nats, of the observer who knows the world, at each position t = 0..length-1.

        E[-log p(v_t+1 | v_1..t)] = H(X_t+1 | X_1..t): no model can do better in expectation. Computed in
        float64 from the law of all beliefs; where these become more than `max_beliefs`, close ones are merged
        with a bound on the error. Raises ValueError where the bound exceeds `tol`, and for generalised models
        with more beliefs (they cannot be merged); `estimate_ideal_loss` always works.
        """
        if length < 0:
            raise ValueError(f"length: expected at least 0, got {length}. Pass the number of tokens.")
        losses, error = _belief_law.ideal_losses(
            self.transitions, self.functional, self.initial, length, max_beliefs, not self.generalised
        )
        if len(losses) < length or error > tol:
            reached = (
                f"more after {len(losses)} tokens, which cannot be merged in a generalised model"
                if len(losses) < length
                else f"an error of up to {error:.2g} from merging more into so many"
            )
            raise ValueError(
                f"ideal_loss: expected at most {max_beliefs} beliefs or an error below tol = {tol:g} nats, got "
                f"{reached}. Pass a larger max_beliefs or tol, a smaller length, or take `estimate_ideal_loss`."
            )
        return jnp.asarray(losses, float)

    def estimate_ideal_loss(self, key: Array, length: int, n: int = 4096) -> MonteCarlo:
        """`ideal_loss` [length] by sampling `n` paths, with the standard error at each position, in nats."""
        if n < 2:
            raise ValueError(f"n: expected at least 2 paths, got {n}. A standard error needs more than one.")
        entropies = self._sampled_entropies(key, n, length)
        return MonteCarlo(entropies.mean(0), entropies.std(0, ddof=1) / np.sqrt(n))

    def _sampled_entropies(self, key: Array, n: int, length: int) -> Array:
        """Entropy of the next token's law at positions 0..length-1 of `n` sampled paths, [n, length]."""
        tokens = self.sample(key, n, length)
        laws = jax.vmap(functools.partial(_next_log_probs, self._law))(tokens[:, : max(length - 1, 0)])
        return jax.scipy.special.entr(jnp.exp(laws)).sum(-1)[:, :length]

    # Between numpy and jax.

    @functools.cached_property
    def _law(self) -> "_Law":
        kind = np.dtype(np.float64)
        emission = self.transitions @ self.functional
        rounded = self.transitions.astype(np.float32).astype(kind) @ self.functional.astype(np.float32).astype(kind)
        return _Law(
            self.transitions,
            self.functional,
            self.initial,
            emission,
            (emission - rounded).astype(np.float32),
            np.abs(self.transitions) @ np.abs(self.functional),
        )

    @functools.cached_property
    def _outcomes(self) -> "_Outcomes":
        flat = self.transitions.transpose(1, 0, 2).reshape(self.num_states, -1)
        count = int(np.max(np.count_nonzero(flat > 0, axis=1)))
        order = np.argsort(flat <= 0, axis=1, kind="stable")[:, :count]  # possible outcomes first
        cumulative = np.cumsum(np.take_along_axis(flat, order, 1), axis=1)
        cumulative /= cumulative[:, -1:]
        # Outcomes at and after the last possible one end at exactly 1, so that no uniform number below 1 falls
        # beyond it, and impossible ones keep an interval of length 0.
        cumulative[cumulative >= cumulative[:, -1:]] = 1.0
        return _Outcomes(cumulative, order // self.num_states, order % self.num_states, np.cumsum(self.initial))


def _numbers(what: str, value: Any, size: int | None = None) -> np.ndarray:
    """`value` as a float64 array of finite numbers, of shape [size] where a size is given."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected an array of real numbers, got {value!r}. ({error})") from error
    if size is not None and array.shape != (size,):
        raise ValueError(f"{what}: expected shape [{size}], one number per state, got {list(array.shape)}.")
    if not np.isfinite(array).all():
        place = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{what}: expected finite numbers, got {array[tuple(place)]} at {place}. Correct the entry.")
    return array


class _Law(NamedTuple):
    """What the recursions need, as float64 numpy arrays on the way into a jitted function."""

    transitions: Any  # [V,N,N]
    functional: Any  # [N]
    initial: Any  # [N]
    emission: Any  # [V,N], T^(v) w: a belief's product with it is the next token's law
    emission_lost: Any  # [V,N], what rounding T and w to float32 takes from `emission`
    emission_size: Any  # [V,N], the same with absolute values: the scale that rounding errors have


class _Outcomes(NamedTuple):
    """The possible (token, next state) of each state, as a table to invert the cumulative law."""

    cumulative: Any  # [N,K]
    token: Any  # [N,K]
    state: Any  # [N,K]
    initial: Any  # [N], cumulative


def _possible(law: _Law, prob: Array, belief: Array, size: Array) -> Array:
    """Whether `prob` is more than rounding. Without negative entries it equals its own scale: prob > 0."""
    return prob > 4 * len(law.functional) * jnp.finfo(prob.dtype).eps * _dot("...n,...n->...", jnp.abs(belief), size)


def _filter(law: _Law, tokens: Array) -> tuple[Array, Array, Array]:
    """Beliefs [T+1,N] and, for each token, log p [T] and its correction for rounded matrices [T].

    After an impossible token beliefs are 0 and log p is -inf; from an invalid token on, both are NaN.
    """

    def observe(belief: Array, token: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        valid = (token >= 0) & (token < len(law.transitions))
        v = jnp.where(valid, token, 0)
        after = _dot("i,ij->j", belief, law.transitions[v])
        prob = jnp.where(valid, _dot("j,j->", after, law.functional), jnp.nan)
        possible = _possible(law, prob, belief, law.emission_size[v]) | jnp.isnan(prob)
        scale = jnp.where(possible, prob, 1)
        after = jnp.where(possible, after / scale, 0)
        lost = _dot("i,i->", belief, law.emission_lost[v]) / scale
        return after, (after, jnp.where(possible, jnp.log(scale), -jnp.inf), lost)

    _, (after, log_prob, lost) = jax.lax.scan(observe, law.initial, tokens)
    return jnp.concatenate([law.initial[None], after]), log_prob, lost


def _in_default_float(law: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, float), law)


@jax.jit
def _path_log_prob(law: _Law, tokens: Array, given: Array) -> Array:
    _, log_prob, lost = _filter(_in_default_float(law), tokens)
    scored = (jnp.arange(len(tokens)) >= given) & jnp.isfinite(log_prob)
    if log_prob.dtype == jnp.float64:
        lost = jnp.zeros_like(lost)  # nothing was rounded
    terms = jnp.concatenate([jnp.where(scored, log_prob, 0), jnp.where(scored, lost, 0)])
    total = jnp.where(jnp.isneginf(log_prob).any(), -jnp.inf, precise_sum(terms))
    return jnp.where(jnp.isnan(log_prob).any(), jnp.nan, total)


@jax.jit
def _beliefs(law: _Law, tokens: Array) -> Array:
    beliefs, log_prob, _ = _filter(_in_default_float(law), tokens)
    possible = jnp.concatenate([jnp.ones(1, bool), jnp.isfinite(jnp.cumsum(log_prob))])
    return jnp.where(possible[:, None], beliefs, jnp.nan)


@jax.jit
def _next_log_probs(law: _Law, tokens: Array) -> Array:
    law = _in_default_float(law)
    beliefs = _beliefs(law, tokens)
    probs = _dot("ti,vi->tv", beliefs, law.emission)
    possible = _possible(law, probs, beliefs[:, None], law.emission_size) | jnp.isnan(probs)
    return jnp.where(possible, jnp.log(jnp.where(possible, probs, 1)), -jnp.inf)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample_states(outcomes: _Outcomes, key: Array, n: int, length: int) -> Array:
    cumulative, first = _in_default_float((outcomes.cumulative, outcomes.initial))
    token, state = jnp.asarray(outcomes.token, jnp.int32), jnp.asarray(outcomes.state, jnp.int32)
    first = jnp.where(first >= first[-1], 1, first)
    uniform = jax.random.uniform(key, (length + 1, n), cumulative.dtype)
    start = jnp.sum(first <= uniform[0][:, None], axis=1)

    def walk(s: Array, u: Array) -> tuple[Array, Array]:
        k = jnp.sum(cumulative[s] <= u[:, None], axis=1)
        return state[s, k], token[s, k]

    return jax.lax.scan(walk, start.astype(jnp.int32), uniform[1:])[1].T


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample_beliefs(law: _Law, key: Array, n: int, length: int) -> Array:
    law = _in_default_float(law)

    def walk(belief: Array, u: Array) -> tuple[Array, Array]:
        probs = _dot("ni,vi->nv", belief, law.emission)
        possible = _possible(law, probs, belief[:, None], law.emission_size)
        cumulative = jnp.cumsum(jnp.where(possible, probs, 0), axis=1)
        total = cumulative[:, -1]
        # u * total may round up to the total, and so to a token beyond the last possible one.
        threshold = jnp.minimum(u * total, jnp.nextafter(total, jnp.zeros_like(total)))
        token = jnp.sum(cumulative <= threshold[:, None], axis=1).astype(jnp.int32)
        after = _dot("ni,nij->nj", belief, law.transitions[token])
        return after / _dot("ni,i->n", after, law.functional)[:, None], token

    uniform = jax.random.uniform(key, (length, n), law.initial.dtype)
    return jax.lax.scan(walk, jnp.broadcast_to(law.initial, (n, len(law.initial))), uniform)[1].T
