"""Rotations of the space that a model's vectors live in, which leave its law as it was."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxwalk.evidence.finding import NotApplicable
from jaxwalk.filters import Embed, LayerNorm, LearnedPositions, Linear, Norm, SinusoidalPositions, Unembed
from jaxwalk.model import Layer, Layers, Transformer


def rotate(model: Transformer, key: Array) -> Transformer:
    """A model with the same law whose stream lives in a randomly rotated space.

    Everything that touches the stream turns with it: token and position vectors, the maps that read it (behind a
    norm: with the norm's scale and bias folded into them), those that write to it, and the output vectors (tied ones
    become their own). RMSNorm commutes with every rotation, LayerNorm with those that fix the all-ones vector.

    Raises:
        NotApplicable: with the reason, where no exact rotation is known.
    """
    D = model.width
    R = _rotation(D, key, fix_ones=has_layer_norm(model))
    layers = Layers.of([_rotate_layer(layer, R) for layer in model.layers])

    positions = model.positions
    if isinstance(positions, SinusoidalPositions):
        positions = LearnedPositions(jax.vmap(positions)(jnp.arange(model.max_length)).astype(model.embed.table.dtype))
    if positions is not None:
        positions = dataclasses.replace(positions, table=_times(positions.table, R))

    scale, bias = (np.ones(D), None) if model.norm is None else _scale_and_bias(model.norm)
    U, b = model.output_vectors, model.unembed.bias
    if bias is not None:
        shift = np.asarray(U, float) @ bias
        if b is not None or np.any(shift):
            b = jnp.asarray(shift if b is None else shift + np.asarray(b, float), U.dtype)
    unembed = Unembed(_times(np.asarray(U, float) * scale, R, U.dtype), b, model.unembed.softcap)
    return dataclasses.replace(
        model,
        embed=Embed(_times(model.token_vectors, R)),
        positions=positions,
        layers=layers,
        norm=None if model.norm is None else _unit(model.norm),
        unembed=unembed,
    )


def _rotation(D: int, key: Array, *, fix_ones: bool) -> Float[np.ndarray, "D D"]:
    """A random rotation; with `fix_ones`, one of those that fix the all-ones vector."""
    free = D - 1 if fix_ones else D
    Q, r = np.linalg.qr(np.asarray(jax.random.normal(key, (free, free)), float))
    Q = Q * np.sign(np.diag(r))
    if free and np.linalg.det(Q) < 0:
        Q[:, 0] *= -1
    if not fix_ones:
        return Q
    basis = np.linalg.qr(np.column_stack([np.ones(D), np.eye(D)[:, 1:]]))[0]  # the first of it is the ones
    turned = np.eye(D)
    turned[1:, 1:] = Q
    return basis @ turned @ basis.T


def _rotate_layer(layer: Layer, R: np.ndarray) -> Layer:
    after = layer.placement in ("post", "res_post")

    def writes(norm: Norm | None) -> Norm | None:
        """A norm of what is written to the stream."""
        if norm is not None and np.ptp(_scale_and_bias(norm)[0]) > 0:
            raise NotApplicable(
                f"{layer.placement}-norm writes scaled vectors to the stream itself, and a scale that differs from "
                "coordinate to coordinate does not commute with rotations"
            )
        if isinstance(norm, LayerNorm) and norm.bias is not None:
            return dataclasses.replace(norm, bias=_times(norm.bias, R))
        return norm

    def part(what: str, norm: Norm, out_norm: Norm | None, module: Any) -> dict[str, Any]:
        scale, bias = (np.ones(len(R)), None) if after else _scale_and_bias(norm)
        return {
            f"{what}_norm": writes(norm) if after else _unit(norm),
            f"{what}_out_norm": writes(out_norm),
            what: _rotate_maps(module, R, scale, bias),
        }

    changes = part("aggregate", layer.aggregate_norm, layer.aggregate_out_norm, layer.aggregate)
    if layer.filter is not None and layer.filter_norm is not None:
        changes |= part("filter", layer.filter_norm, layer.filter_out_norm, layer.filter)
    return dataclasses.replace(layer, **changes)


def _rotate_maps(module: Any, R: np.ndarray, scale: np.ndarray, bias: np.ndarray | None) -> Any:
    """`module` with its maps turned: it reads (n scale + bias) through them, where n comes rotated."""
    kind = type(module)
    reads: frozenset[str] = getattr(kind, "reads", frozenset())
    writes: frozenset[str] = getattr(kind, "writes", frozenset())
    if not reads or not writes:
        raise NotApplicable(
            f"{kind.__name__} reads the stream coordinate by coordinate, not through maps that could turn"
        )
    turned = {}
    for name in sorted(reads | writes):
        m = getattr(module, name)
        weight = np.asarray(m.weight, float)
        dtype = m.weight.dtype
        if name in writes:
            turned[name] = Linear(_times(weight, R, dtype), None if m.bias is None else _times(m.bias, R))
            continue
        b = m.bias
        if bias is not None and (b is not None or np.any(bias)):
            b = jnp.asarray(bias @ weight + (0 if b is None else np.asarray(b, float)), dtype)
        turned[name] = Linear(jnp.asarray(R.T @ (scale[:, None] * weight), dtype), b)
    return dataclasses.replace(module, **turned)


def _times(rows: Any, R: np.ndarray, dtype: Any = None) -> Array:
    """Row vectors, rotated, in their own dtype or `dtype`."""
    return jnp.asarray(np.asarray(rows, float) @ R, rows.dtype if dtype is None else dtype)


def _scale_and_bias(norm: Norm) -> tuple[np.ndarray, np.ndarray | None]:
    """What a norm multiplies by and adds."""
    bias = getattr(norm, "bias", None)
    scale = np.ones(1) if norm.scale is None else np.asarray(norm.scale, float) + getattr(norm, "unit_offset", False)
    return scale, None if bias is None else np.asarray(bias, float)


def _unit(norm: Norm) -> Norm:
    """The norm without scale and bias, of the same structure."""
    if isinstance(norm, LayerNorm):
        scale, bias = jax.tree.map(jnp.ones_like, norm.scale), jax.tree.map(jnp.zeros_like, norm.bias)
        return dataclasses.replace(norm, scale=scale, bias=bias)
    return dataclasses.replace(norm, scale=jnp.full_like(norm.scale, 1 - norm.unit_offset))


def has_layer_norm(model: Transformer) -> bool:
    """Whether any norm of the stream is a LayerNorm."""
    norms = [
        norm
        for block in model.layers.blocks
        for layer in block.period
        for norm in (layer.aggregate_norm, layer.aggregate_out_norm, layer.filter_norm, layer.filter_out_norm)
    ]
    return any(isinstance(norm, LayerNorm) for norm in (model.norm, *norms))
