"""Matrix products: a vector-matrix primitive that batches into one 2D product, and full-precision products.

Under two vmaps (positions, then paths), x @ W is a product with two batch dimensions, and the gradient with respect to
W contracts both. For this, XLA on CPU materialises a transposed copy of the larger operand, which makes the whole
gradient 1.2 to 1.3 times slower. The primitive here differs from x @ W only in its batching rule, which merges all
batch dimensions into one. `benchmarks/train_cpu.py` compares the two ("plain product").

The primitive also accepts a transposed matrix, such as the output vectors. XLA on CPU copies a transposed matrix before
it multiplies; with few rows, as in decoding, the copy takes longer than the product.

The precision is a parameter of each operation, read from `jax.default_matmul_precision` when the operation is traced,
as for JAX's own products, so that `exact` functions stay exact inside a caller's `jax.jit`.
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

_matmul_p = Primitive("rows_times_matrix")

FEW_ROWS = 32
"""On CPU, products of fewer rows than this with a transposed matrix are computed as (w x^T)^T."""


def exact(function: Function) -> Function:
    """Decorate `function` to compute its matrix products at the highest precision: float32 also on TPU and GPU.

    Apply it inside `jax.jit` (below it, as a decorator), as it takes effect while `function` is traced.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def times(x: Float[Array, " D"], w: Float[Array, "D E"]) -> Float[Array, " E"]:
    """Compute x @ w.

    Raises:
        TypeError: if the operands differ in dtype, or their shapes do not fit.
    """
    return _times(x, w, transposed=False)


def times_columns(x: Float[Array, " D"], columns: Float[Array, "E D"]) -> Float[Array, " E"]:
    """Compute x @ columns.T, for a matrix stored by its columns.

    Raises:
        TypeError: if the operands differ in dtype, or their shapes do not fit.
    """
    return _times(x, columns, transposed=True)


def _times(x: Array, w: Array, transposed: bool) -> Array:
    if x.dtype != w.dtype:
        raise TypeError(f"times: expected operands of one dtype, got {x.dtype} and {w.dtype}.")
    config: Any = jax.config  # whose options are known to type checkers in some releases only
    precision = config.jax_default_matmul_precision
    return _matmul_p.bind(x[None], w, transposed=transposed, precision=precision)[0]


def _matmul(x: Array, w: Array, *, transposed: bool = False, precision: str | None = None) -> Array:
    """[N, D] times w: [D, E], or [E, D] if `transposed`."""
    return lax.dot_general(x, w, (((1,), (int(transposed),)), ((), ())), precision=precision)


def _matmul_on_cpu(x: Array, w: Array, *, transposed: bool, precision: str | None) -> Array:
    if transposed and x.shape[0] < FEW_ROWS:
        # Without the barrier, XLA would cancel the transposes and copy w again.
        return lax.optimization_barrier(lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision=precision)).T
    return _matmul(x, w, transposed=transposed, precision=precision)


def _abstract_eval(x: Any, w: Any, *, transposed: bool, precision: str | None) -> Any:
    D, E = w.shape[::-1] if transposed else w.shape
    if x.shape[1] != D:
        raise TypeError(f"times: expected [D] times [D, E], got {x.str_short()} and {w.str_short()}.")
    return jax.core.ShapedArray((x.shape[0], E), x.dtype)


def _batch(
    operands: tuple[Array, Array], axes: tuple[Any, Any], *, transposed: bool, precision: str | None
) -> tuple[Array, int]:
    (x, w), (x_axis, w_axis) = operands, axes
    if w_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        rows = _matmul_p.bind(x.reshape(-1, x.shape[-1]), w, transposed=transposed, precision=precision)
        return rows.reshape(*x.shape[:-1], rows.shape[-1]), 0
    w = jnp.moveaxis(w, w_axis, 0)
    contraction = 2 if transposed else 1
    if x_axis is None:
        products = lax.dot_general(w, x, (((contraction,), (1,)), ((), ())), precision=precision)
        return products.swapaxes(1, 2), 0
    x = jnp.moveaxis(x, x_axis, 0)
    return lax.dot_general(x, w, (((2,), (contraction,)), ((0,), (0,))), precision=precision), 0


def _transpose_x(cotangent: Array, x: Any, w: Array, *, transposed: bool, precision: str | None) -> Array:
    return _matmul_p.bind(cotangent, w, transposed=not transposed, precision=precision)


def _transpose_w(cotangent: Array, x: Array, w: Any, *, transposed: bool, precision: str | None) -> Array:
    left, right = (cotangent, x) if transposed else (x, cotangent)
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=precision)


_matmul_p.def_impl(jax.jit(_matmul_p.bind, static_argnames=("transposed", "precision")))
_matmul_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(_matmul_p, mlir.lower_fun(_matmul, multiple_results=False))
mlir.register_lowering(_matmul_p, mlir.lower_fun(_matmul_on_cpu, multiple_results=False), platform="cpu")
batching.primitive_batchers[_matmul_p] = _batch
ad.defbilinear(_matmul_p, _transpose_x, _transpose_w)
