"""S5 (Smith et al., arXiv 2208.04933): one state space model of all channels, diagonal in the HiPPO matrix's basis."""

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
    complex_of,
    steps_between,
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
    """P, the number of complex numbers in the state, even: one of each conjugate pair is stored."""
    dt_min: float = 0.001
    dt_max: float = 0.1
    """Initial step sizes, one per number of the state, are between these."""

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
            # V^-1 B and C V of the paper, transposed, as B multiplies rows here; V is unitary.
            B_re=B @ V_re,
            B_im=-B @ V_im,
            C_re=V_re.T @ C,
            C_im=V_im.T @ C,
            skip=normal(key_skip, (D,), 1),
            output=GatedOutput(value=None, gate=Linear.init(D, D, bias=True, key=key_gate)),
            log_neg_re=jnp.asarray(np.log(-poles.real), jnp.float32),
            im=jnp.asarray(poles.imag, jnp.float32),
            log_dt=jnp.log(steps_between(key_dt, (P // 2,), self.dt_min, self.dt_max)),
        )


@module
class S5(StateSpace):
    """h' = lambda h + B u in steps dt with a zero-order hold, y_i = 2 Re(C h_i) + D u_i, for conjugate pairs.

    lambda = -exp(log_neg_re) + i im is initialised to the eigenvalues of the normal part of HiPPO-LegS; dt =
    exp(log_dt). The readout is the paper's g * sigmoid(gate(g)), g = GELU(y), which has no output map. G is the real
    and imaginary parts of the numbers in the state, and pairs of channels of the direct term D u, whose A is the
    identity.
    Kind of A: exact, the same for all inputs. Held are the gates of the readout. The paper trains the real parts of
    lambda directly; their logarithms, trained here, keep them negative and the state stable.
    """

    log_neg_re: Float[Array, " N"] = nnx.data()
    im: Float[Array, " N"] = nnx.data()
    log_dt: Float[Array, " N"] = nnx.data()

    def discrete(self) -> tuple[Complex[Array, " N"], Complex[Array, " N"]]:
        poles = complex_of(-jnp.exp(widened(self.log_neg_re)), self.im)
        log_decay, factor = zero_order_hold(poles, jnp.exp(widened(self.log_dt)))
        return log_decay, 2 * factor  # once for each number of a conjugate pair


def hippo(P: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [P/2] with positive imaginary parts, and eigenvectors [P, P/2], of the normal part of HiPPO-LegS.

    That matrix has -1/2 on the diagonal, -sqrt((n + 1/2)(k + 1/2)) at n > k, and is otherwise antisymmetric.
    """
    n = np.sqrt(np.arange(P) + 0.5)
    lower = -np.tril(np.outer(n, n), -1)
    frequencies, V = np.linalg.eigh(-1j * (lower - lower.T))
    return -0.5 + 1j * frequencies[P // 2 :], V[:, P // 2 :]
