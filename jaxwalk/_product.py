"""Vector times matrix, as one two-dimensional product however deeply it is batched.

Under two vmaps (positions, then paths) x @ W is a product with two batch dimensions, and the gradient for W contracts
both. XLA on CPU writes out a transposed copy of the larger operand for that, and the whole gradient takes more than
twice as long. The primitive here differs from x @ W in its batching rule only, which makes one batch dimension of all:
what is differentiated is then two-dimensional. `benchmarks/train_cpu.py` has "plain product" as a contender.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

_rows_p = Primitive("rows_times_matrix")


def times(x: Float[Array, " D"], w: Float[Array, "D E"]) -> Float[Array, " E"]:
    """x @ w, of one dtype."""
    if x.dtype != w.dtype:
        raise TypeError(f"times: expected one dtype, got {x.dtype} and {w.dtype}.")
    return _rows_p.bind(x[None], w)[0]


def _rows(x: Array, w: Array) -> Array:
    """[N, D] times [D, E]."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def _abstract(x: Any, w: Any) -> Any:
    if x.shape[1] != w.shape[0]:
        raise TypeError(f"times: expected [D] times [D, E], got {x.str_short()} and {w.str_short()}.")
    return jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype)


def _batch(operands: tuple[Array, Array], axes: tuple[Any, Any]) -> tuple[Array, int]:
    (x, w), (x_axis, w_axis) = operands, axes
    if w_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        rows = _rows_p.bind(x.reshape(-1, x.shape[-1]), w)
        return rows.reshape(*x.shape[:-1], w.shape[-1]), 0
    w = jnp.moveaxis(w, w_axis, 0)
    if x_axis is None:
        return lax.dot_general(w, x, (((1,), (1,)), ((), ()))).swapaxes(1, 2), 0
    return lax.dot_general(jnp.moveaxis(x, x_axis, 0), w, (((2,), (1,)), ((0,), (0,)))), 0


_rows_p.def_impl(jax.jit(_rows))
_rows_p.def_abstract_eval(_abstract)
mlir.register_lowering(_rows_p, mlir.lower_fun(_rows, multiple_results=False))
batching.primitive_batchers[_rows_p] = _batch
ad.defbilinear(
    _rows_p,
    lambda cotangent, x, w: _rows_p.bind(cotangent, w.T),
    lambda cotangent, x, w: _rows(x.T, cotangent),
)
