"""Matrix products: vector times matrix as one two-dimensional product, and functions whose products are exact.

Under two vmaps (positions, then paths) x @ W is a product with two batch dimensions, and the gradient for W contracts
both. XLA on CPU writes out a transposed copy of the larger operand for that, which makes the whole gradient 1.2 to 1.3
times slower. The primitive here differs from x @ W in its batching rule, which merges all batch dimensions into one.
`benchmarks/train_cpu.py` has "plain product" as a contender.

The primitive also handles a matrix that is stored by columns, as output vectors are. XLA on CPU copies such a matrix,
transposed, before it multiplies; with few rows, as in decoding, the copy takes longer than the product.

The precision is a parameter of each operation, read from `jax.default_matmul_precision` when the operation is traced,
as JAX's own products do, so that `exact` functions stay exact inside a caller's `jax.jit`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

Function = TypeVar("Function", bound=Callable[..., Any])

_rows_p = Primitive("rows_times_matrix")

FEW_ROWS = 32
"""Below this many rows, on CPU, the product with a matrix stored by columns is computed transposed."""


def exact(function: Function) -> Function:
    """`function`, traced with every matrix product at the highest precision: float32 products on TPU and GPU too.

    Apply it below `jax.jit`, so that it takes effect while tracing.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced  # type: ignore[return-value]


def times(x: Float[Array, " D"], w: Float[Array, "D E"]) -> Float[Array, " E"]:
    """x @ w. Both must have the same dtype."""
    return _times(x, w, by_columns=False)


def times_columns(x: Float[Array, " D"], columns: Float[Array, "E D"]) -> Float[Array, " E"]:
    """x @ columns.T. Both must have the same dtype."""
    return _times(x, columns, by_columns=True)


def _times(x: Array, w: Array, by_columns: bool) -> Array:
    if x.dtype != w.dtype:
        raise TypeError(f"times: expected operands of one dtype, got {x.dtype} and {w.dtype}.")
    precision = jax.config.jax_default_matmul_precision
    return _rows_p.bind(x[None], w, by_columns=by_columns, precision=precision)[0]


def _rows(x: Array, w: Array, *, by_columns: bool = False, precision: str | None = None) -> Array:
    """[N, D] times [D, E], or times [E, D] stored by columns."""
    return lax.dot_general(x, w, (((1,), (int(by_columns),)), ((), ())), precision=precision)


def _rows_on_cpu(x: Array, w: Array, *, by_columns: bool, precision: str | None) -> Array:
    if by_columns and x.shape[0] < FEW_ROWS:
        # Without the barrier XLA would fold the transposes away, and copy again.
        return lax.optimization_barrier(lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision=precision)).T
    return _rows(x, w, by_columns=by_columns, precision=precision)


def _abstract(x: Any, w: Any, *, by_columns: bool, precision: str | None) -> Any:
    D, E = w.shape[::-1] if by_columns else w.shape
    if x.shape[1] != D:
        raise TypeError(f"times: expected [D] times [D, E], got {x.str_short()} and {w.str_short()}.")
    return jax.core.ShapedArray((x.shape[0], E), x.dtype)


def _batch(
    operands: tuple[Array, Array], axes: tuple[Any, Any], *, by_columns: bool, precision: str | None
) -> tuple[Array, int]:
    (x, w), (x_axis, w_axis) = operands, axes
    if w_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        rows = _rows_p.bind(x.reshape(-1, x.shape[-1]), w, by_columns=by_columns, precision=precision)
        return rows.reshape(*x.shape[:-1], rows.shape[-1]), 0
    w = jnp.moveaxis(w, w_axis, 0)
    contracted = 2 if by_columns else 1
    if x_axis is None:
        products = lax.dot_general(w, x, (((contracted,), (1,)), ((), ())), precision=precision)
        return products.swapaxes(1, 2), 0
    x = jnp.moveaxis(x, x_axis, 0)
    return lax.dot_general(x, w, (((2,), (contracted,)), ((0,), (0,))), precision=precision), 0


def _pull_rows(cotangent: Array, x: Any, w: Array, *, by_columns: bool, precision: str | None) -> Array:
    return _rows_p.bind(cotangent, w, by_columns=not by_columns, precision=precision)


def _pull_matrix(cotangent: Array, x: Array, w: Any, *, by_columns: bool, precision: str | None) -> Array:
    left, right = (cotangent, x) if by_columns else (x, cotangent)
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=precision)


_rows_p.def_impl(jax.jit(_rows_p.bind, static_argnames=("by_columns", "precision")))
_rows_p.def_abstract_eval(_abstract)
mlir.register_lowering(_rows_p, mlir.lower_fun(_rows, multiple_results=False))
mlir.register_lowering(_rows_p, mlir.lower_fun(_rows_on_cpu, multiple_results=False), platform="cpu")
batching.primitive_batchers[_rows_p] = _batch
ad.defbilinear(_rows_p, _pull_rows, _pull_matrix)
