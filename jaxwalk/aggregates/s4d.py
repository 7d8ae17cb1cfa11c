"""S4D (Gu et al., arXiv 2206.11893): diagonal state spaces, one for each channel, the same at all times."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, runs_and_positions
from jaxwalk.aggregates._diagonal import recur_and_read
from jaxwalk.aggregates._state_space import GatedOutput, complex_of, steps_between, widened, zero_order_hold
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, normal, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """S4D-Lin, with the paper's choices."""

    name: ClassVar[str] = "s4d"
    state: int = 64
    """N, complex numbers in the state of each channel, an even number: N / 2 are kept, of conjugate pairs."""
    dt_min: float = 0.001
    dt_max: float = 0.1
    """Between these the steps start, one for each channel."""

    def check(self) -> Iterable[str]:
        if self.state < 2 or self.state % 2:
            yield f"state: expected an even number of at least 2, got {self.state}"
        if not 0 < self.dt_min <= self.dt_max:
            yield f"dt_max: expected 0 < dt_min <= dt_max, got dt_min = {self.dt_min}, dt_max = {self.dt_max}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "S4D":
        D, N = width, self.state // 2
        key_re, key_im, key_skip, key_dt, key_value, key_gate = jax.random.split(key, 6)
        frequencies = math.pi * jnp.arange(N, dtype=jnp.float32)
        return S4D(
            log_neg_re=jnp.full((N, D), math.log(0.5), jnp.float32),
            im=jnp.broadcast_to(frequencies[:, None], (N, D)),
            log_dt=jnp.log(steps_between(key_dt, (D,), self.dt_min, self.dt_max)),
            C_re=normal(key_re, (N, D), math.sqrt(0.5)),
            C_im=normal(key_im, (N, D), math.sqrt(0.5)),
            skip=normal(key_skip, (D,), 1),
            output=GatedOutput(
                value=Linear.init(D, D, bias=True, gain=1 / math.sqrt(2 * depth), key=key_value),
                gate=Linear.init(D, D, bias=True, key=key_gate),
            ),
        )


class State(NamedTuple):
    """h, in at least complex64."""

    h: Complex[Array, "N D"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class S4D(Aggregate):
    """h' = lambda h + u by steps dt with a zero-order hold, y_i = 2 Re(C . h_i) + D u_i, channel by channel.

    h is one number of each of N / 2 conjugate pairs. lambda = -exp(log_neg_re) + i im starts as -1/2 + i pi n; dt =
    exp(log_dt). B is 1: only its product with C matters. A_ij = kernel[i - j], the channel's response to an impulse,
    with D on the diagonal: the same for all inputs. The readout is the paper's gated linear unit value(g) *
    sigmoid(gate(g)), g = GELU(y). G is the channels, and the values are the inputs themselves. Kind of A: exact. Held
    are the gates of the readout. The paper lets B be trained too; it would change no function that C cannot make.

    The parallel form is a product of Fourier transforms (on CPU, with its gradient, 1.4 to 4 times faster than
    chunks, 6 to 20 times than a scan), or a scan where documents are given, as kernels do not stop at their borders.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    undecayed: ClassVar[frozenset[str]] = frozenset({"log_neg_re", "im"})

    log_neg_re: Float[Array, "N D"] = nnx.data()
    im: Float[Array, "N D"] = nnx.data()
    log_dt: Float[Array, " D"] = nnx.data()
    C_re: Float[Array, "N D"] = nnx.data()
    C_im: Float[Array, "N D"] = nnx.data()
    skip: Float[Array, " D"] = nnx.data()
    """D of the paper."""
    output: GatedOutput = nnx.data()

    def _discrete(self) -> tuple[Complex[Array, "N D"], Complex[Array, "N D"]]:
        """The logarithms of the decays, and C times the factors on what enters."""
        poles = complex_of(-jnp.exp(widened(self.log_neg_re)), self.im)
        dt = jnp.broadcast_to(jnp.exp(widened(self.log_dt))[None], self.im.shape)
        log_decay, factor = zero_order_hold(poles, dt)
        return log_decay, 2 * complex_of(self.C_re, self.C_im) * factor

    def kernel(self, length: int) -> Float[Array, "D length"]:
        """What an input does to the outputs from its own position on."""
        log_decay, C = self._discrete()
        # Powers of the decay in two steps, n = 16 a + b: as many exponentials as a + b, not a b.
        fine = jnp.exp(log_decay[None] * _count(16, log_decay))
        coarse = jnp.exp(16 * log_decay[None] * _count(-(-length // 16), log_decay)) * C[None]
        kernel = jnp.einsum("and,bnd->dab", coarse.real, fine.real) - jnp.einsum("and,bnd->dab", coarse.imag, fine.imag)
        kernel = kernel.reshape(len(kernel), -1)[:, :length]
        return kernel.at[:, 0].add(self.skip.astype(kernel.dtype))

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        return x.T[..., None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        columns = jnp.arange(len(x))
        rows = columns if rows is None else rows
        runs, _ = runs_and_positions(segments, len(x))
        A = self.kernel(len(x))[:, jnp.maximum(rows[:, None] - columns[None], 0)]
        return jnp.where(causal_mask(rows, columns, runs)[None], A, 0)

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(functools.partial(self.output, hold=hold))(y[..., 0].T)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        if segments is not None:
            return self._scan(x, runs_and_positions(segments, len(x))[1] > 0, self.init_state(len(x)).h)[0]
        T, wider = len(x), widened(x).T
        kernel = jnp.fft.rfft(self.kernel(T), 2 * T)
        y = jnp.fft.irfft(kernel * jnp.fft.rfft(wider, 2 * T), 2 * T)[:, :T]
        return jax.vmap(self.output)(y.T.astype(x.dtype))

    def _scan(self, x: Array, keep: Bool[Array, " T"], start: Array) -> tuple[Array, Array]:
        """The output, and the last state."""
        log_decay, C = self._discrete()
        decay, wider = jnp.exp(log_decay), widened(x)

        def parts(at: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            keep, entering = at
            return jnp.where(keep, decay, 0), jnp.broadcast_to(entering[None], decay.shape), C

        read, last = recur_and_read(parts, (keep, wider.astype(decay.dtype)), start)
        y = read.real + self.skip.astype(wider.dtype)[None] * wider
        return jax.vmap(self.output)(y.astype(x.dtype)), last

    def init_state(self, length: int) -> State:
        zeros = jnp.zeros(self.im.shape, wide(self.im.dtype))
        return State(complex_of(zeros, zeros), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, h = self._scan(x, jnp.ones(len(x), bool), self.init_state(length).h)
        return y, State(h, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        y, h = self._scan(x[None], jnp.ones(1, bool), state.h)
        position = state.position + 1
        return State(h, position, state.length), jnp.where(position <= state.length, y[0], jnp.nan)


def _count(length: int, like: Array) -> Array:
    """0, 1, ... along the first axis."""
    return jnp.arange(length).astype(like.dtype).reshape(-1, *(1,) * like.ndim)
