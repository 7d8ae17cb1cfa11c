"""Vector times matrix, as one two-dimensional product however deeply it is batched.

Under two vmaps (positions, then paths) x @ W is a product with two batch dimensions, and the gradient for W contracts
both. XLA on CPU writes out a transposed copy of the larger operand for that, and the whole gradient takes more than
twice as long. The primitive here differs from x @ W in its batching rule, which makes one batch dimension of all: what
is differentiated is then two-dimensional. `benchmarks/train_cpu.py` has "plain product" as a contender.

It also knows a matrix that is given by its columns, as output vectors are. XLA on CPU copies such a matrix, transposed,
before it multiplies; where few rows are multiplied, as in decoding, the copy takes longer than all else: on two cores
8 rows times 49152 columns of 576 numbers take 43 ms so, and 7 ms as the product's transpose.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

_rows_p = Primitive("rows_times_matrix")

FEW = 128
"""Rows below which, on CPU, a product with a matrix that is given by its columns is made transposed."""


def times(x: Float[Array, " D"], w: Float[Array, "D E"]) -> Float[Array, " E"]:
    """x @ w, of one dtype."""
    return _times(x, w, by_columns=False)


def times_columns(x: Float[Array, " D"], columns: Float[Array, "E D"]) -> Float[Array, " E"]:
    """x @ columns.T, of one dtype."""
    return _times(x, columns, by_columns=True)


def _times(x: Array, w: Array, by_columns: bool) -> Array:
    if x.dtype != w.dtype:
        raise TypeError(f"times: expected one dtype, got {x.dtype} and {w.dtype}.")
    return _rows_p.bind(x[None], w, by_columns=by_columns)[0]


def _rows(x: Array, w: Array, *, by_columns: bool = False) -> Array:
    """[N, D] times [D, E], or times [E, D] by its columns."""
    return lax.dot_general(x, w, (((1,), (int(by_columns),)), ((), ())))


def _rows_on_cpu(x: Array, w: Array, *, by_columns: bool) -> Array:
    if by_columns and x.shape[0] < FEW:
        # Without the barrier XLA makes it one product again, and the copy.
        return lax.optimization_barrier(lax.dot_general(w, x, (((1,), (1,)), ((), ())))).T
    return _rows(x, w, by_columns=by_columns)


def _abstract(x: Any, w: Any, *, by_columns: bool) -> Any:
    D, E = w.shape[::-1] if by_columns else w.shape
    if x.shape[1] != D:
        raise TypeError(f"times: expected [D] times [D, E], got {x.str_short()} and {w.str_short()}.")
    return jax.core.ShapedArray((x.shape[0], E), x.dtype)


def _batch(operands: tuple[Array, Array], axes: tuple[Any, Any], *, by_columns: bool) -> tuple[Array, int]:
    (x, w), (x_axis, w_axis) = operands, axes
    if w_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        rows = _rows_p.bind(x.reshape(-1, x.shape[-1]), w, by_columns=by_columns)
        return rows.reshape(*x.shape[:-1], rows.shape[-1]), 0
    w = jnp.moveaxis(w, w_axis, 0)
    along = 2 if by_columns else 1
    if x_axis is None:
        return lax.dot_general(w, x, (((along,), (1,)), ((), ()))).swapaxes(1, 2), 0
    return lax.dot_general(jnp.moveaxis(x, x_axis, 0), w, (((2,), (along,)), ((0,), (0,)))), 0


_rows_p.def_impl(jax.jit(_rows_p.bind, static_argnames="by_columns"))
_rows_p.def_abstract_eval(_abstract)
mlir.register_lowering(_rows_p, mlir.lower_fun(_rows, multiple_results=False))
mlir.register_lowering(_rows_p, mlir.lower_fun(_rows_on_cpu, multiple_results=False), platform="cpu")
batching.primitive_batchers[_rows_p] = _batch
ad.defbilinear(
    _rows_p,
    lambda cotangent, x, w, *, by_columns: _rows_p.bind(cotangent, w, by_columns=not by_columns),
    lambda cotangent, x, w, *, by_columns: _rows(cotangent.T, x) if by_columns else _rows(x.T, cotangent),
)
