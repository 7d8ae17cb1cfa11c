"""The linear recurrent unit (Orvieto et al., arXiv 2303.06349): a diagonal complex state shared by all channels."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float

from jaxwalk.aggregates._state_space import GatedOutput, StateSpace, to_complex, widened
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, normal


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The linear recurrent unit, with the defaults of the paper."""

    name: ClassVar[str] = "lru"
    state: int | None = None
    """N, the number of complex elements of the state; by default the width."""
    r_min: float = 0.0
    r_max: float = 1.0
    """Initial decays are distributed uniformly in area on the ring between these radii."""
    max_phase: float = 2 * math.pi
    """The largest phase of an initial decay."""

    def check(self) -> Iterable[str]:
        if self.state is not None and self.state < 1:
            yield f"state: expected at least 1, got {self.state}"
        if not 0 <= self.r_min < self.r_max <= 1:
            yield f"r_max: expected 0 <= r_min < r_max <= 1, got r_min = {self.r_min}, r_max = {self.r_max}"
        if self.max_phase <= 0:
            yield f"max_phase: expected more than 0, got {self.max_phase}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "LRU":
        D, N = width, self.state or width
        keys = jax.random.split(key, 9)
        # Bounded away from 0 and 1, where the logarithms are infinite.
        u, phase = (jax.random.uniform(k, (N,), jnp.float32, 1e-4, 1 - 1e-4) for k in keys[:2])
        squared = u * (self.r_max**2 - self.r_min**2) + self.r_min**2
        return LRU(
            B_re=normal(keys[2], (D, N), 1 / math.sqrt(2 * D)),
            B_im=normal(keys[3], (D, N), 1 / math.sqrt(2 * D)),
            C_re=normal(keys[4], (N, D), 1 / math.sqrt(N)),
            C_im=normal(keys[5], (N, D), 1 / math.sqrt(N)),
            skip=normal(keys[6], (D,), 1),
            output=GatedOutput(
                value=Linear.init(D, D, bias=True, gain=1 / math.sqrt(2 * depth), key=keys[7]),
                gate=Linear.init(D, D, bias=True, key=keys[8]),
            ),
            nu_log=jnp.log(-0.5 * jnp.log(squared)),
            theta_log=jnp.log(self.max_phase * phase),
            gamma_log=0.5 * jnp.log1p(-squared),
        )


@module
class LRU(StateSpace):
    """h_i = lambda * h_(i-1) + gamma * B u_i, y_i = Re(C h_i) + D u_i, lambda = exp(-exp(nu_log) + i exp(theta_log)).

    gamma = exp(gamma_log) is initialised to sqrt(1 - |lambda|^2), so that the state has the magnitude of its inputs.
    The readout is the gated linear unit that follows in the blocks of the paper: value(g) * sigmoid(gate(g)) with
    g = GELU(y). Mixing matrix, held coefficients and memory are those of `StateSpace`.
    """

    nu_log: Float[Array, " N"] = nnx.data()
    theta_log: Float[Array, " N"] = nnx.data()
    gamma_log: Float[Array, " N"] = nnx.data()

    def discrete(self) -> tuple[Complex[Array, " N"], Complex[Array, " N"]]:
        nu, theta, gamma = (jnp.exp(widened(a)) for a in (self.nu_log, self.theta_log, self.gamma_log))
        return to_complex(-nu, theta), to_complex(gamma, jnp.zeros_like(gamma))
