"""S5 (Smith et al., arXiv 2208.04933): a state space model shared by all channels, diagonal in the HiPPO eigenbasis."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float

from jaxwalk.aggregates._state_space import (
    GatedOutput,
    StateSpace,
    log_uniform,
    to_complex,
    widened,
    zero_order_hold,
)
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, normal


@dataclass(frozen=True)
class Config(AggregateConfig):
    """S5, with one block of the HiPPO matrix."""

    name: ClassVar[str] = "s5"
    state: int = 64
    """P, the number of complex elements of the state, even: one per conjugate pair is stored."""
    dt_min: float = 0.001
    dt_max: float = 0.1
    """Initial step sizes, one per element of the state, are log-uniform between these bounds."""

    def check(self) -> Iterable[str]:
        if self.state < 2 or self.state % 2:
            yield f"state: expected an even number of at least 2, got {self.state}"
        if not 0 < self.dt_min <= self.dt_max:
            yield f"dt_max: expected 0 < dt_min <= dt_max, got dt_min = {self.dt_min}, dt_max = {self.dt_max}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "S5":
        D, P = width, self.state
        key_B, key_C, key_skip, key_gate, key_dt = jax.random.split(key, 5)
        poles, V = hippo(P)
        V_re, V_im = (jnp.asarray(part, jnp.float32) for part in (V.real, V.imag))
        B, C = normal(key_B, (D, P), 1 / math.sqrt(D)), normal(key_C, (P, D), 1 / math.sqrt(P))
        return S5(
            # The paper's V^-1 B and C V, transposed, as vectors are rows here. V^-1 is the conjugate transpose of V.
            B_re=B @ V_re,
            B_im=-B @ V_im,
            C_re=V_re.T @ C,
            C_im=V_im.T @ C,
            skip=normal(key_skip, (D,), 1),
            output=GatedOutput(value=None, gate=Linear.init(D, D, bias=True, key=key_gate)),
            log_neg_re=jnp.asarray(np.log(-poles.real), jnp.float32),
            im=jnp.asarray(poles.imag, jnp.float32),
            log_dt=jnp.log(log_uniform(key_dt, (P // 2,), self.dt_min, self.dt_max)),
        )


@module
class S5(StateSpace):
    """h' = lambda h + B u with step size dt and a zero-order hold, y_i = 2 Re(C h_i) + D u_i.

    h has one element per conjugate pair. lambda = -exp(log_neg_re) + i im is initialised to the eigenvalues of the
    normal part of HiPPO-LegS; dt = exp(log_dt). The paper trains the real parts of lambda directly; training their
    logarithms keeps them negative, and the state stable. The readout is g * sigmoid(gate(g)) with g = GELU(y), as in
    the paper, without an output map. Mixing matrix, held coefficients and memory are those of `StateSpace`.
    """

    log_neg_re: Float[Array, " N"] = nnx.data()
    im: Float[Array, " N"] = nnx.data()
    log_dt: Float[Array, " N"] = nnx.data()

    def discrete(self) -> tuple[Complex[Array, " N"], Complex[Array, " N"]]:
        poles = to_complex(-jnp.exp(widened(self.log_neg_re)), self.im)
        log_decay, factor = zero_order_hold(poles, jnp.exp(widened(self.log_dt)))
        return log_decay, 2 * factor  # once for each element of a conjugate pair


def hippo(P: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [P/2] with positive imaginary parts and eigenvectors [P, P/2] of the normal part of HiPPO-LegS.

    This part has -1/2 on the diagonal, -sqrt((n + 1/2)(k + 1/2)) at n > k, and is otherwise antisymmetric.
    """
    n = np.sqrt(np.arange(P) + 0.5)
    lower = -np.tril(np.outer(n, n), -1)
    frequencies, V = np.linalg.eigh(-1j * (lower - lower.T))
    return -0.5 + 1j * frequencies[P // 2 :], V[:, P // 2 :]
