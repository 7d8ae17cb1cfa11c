"""Models from configs, and conversions of a model: to another dtype, without fused kernels, with unrolled layers."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxwalk import aggregates
from jaxwalk.config import AggregateConfig, MLPConfig, ModelConfig
from jaxwalk.filters import (
    MLP,
    Embed,
    GatedMLP,
    Key,
    LayerNorm,
    LearnedPositions,
    Linear,
    Norm,
    RMSNorm,
    SinusoidalPositions,
    Unembed,
    stream,
)
from jaxwalk.model.layer import Filter, Layer
from jaxwalk.model.stack import Block, Layers
from jaxwalk.model.transformer import Transformer


def init(config: ModelConfig, key: Key) -> Transformer:
    """A model with random float32 parameters, determined by the config and the key.

    Args:
        config: the options of the model.
        key: a `jax.random` key.

    Raises:
        ConfigError: if options are inconsistent, such as heads that do not divide the width.
    """
    return _init(config, key)


@functools.partial(jax.jit, static_argnames="config")
def _init(config: ModelConfig, key: Key) -> Transformer:
    positions: LearnedPositions | SinusoidalPositions | None = None
    if config.positions == "learned":
        positions = LearnedPositions.init(
            config.max_length, config.width, offset=config.position_offset, key=stream(key, "positions")
        )
    elif config.positions == "sinusoidal":
        positions = SinusoidalPositions(config.width)
    return Transformer(
        embed=Embed.init(
            config.vocab_size,
            config.width,
            scale=config.embed_scale,
            norm=_init_norm(config) if config.embed_norm else None,
            key=stream(key, "embed"),
        ),
        positions=positions,
        layers=_init_layers(config, stream(key, "layers")),
        norm=None if config.placement == "post" else _init_norm(config),
        unembed=Unembed.init(
            config.vocab_size,
            config.width,
            tied=config.tied,
            bias=config.unembed_bias,
            softcap=config.logit_softcap,
            key=stream(key, "unembed"),
        ),
        max_length=config.max_length,
        remat=config.remat,
    )


def _init_layers(config: ModelConfig, key: Key) -> Layers:
    """Initialise the layers. Those with equal options are initialised together, by vmap."""
    by_options: dict[Any, list[int]] = {}
    for layer_index, options in enumerate(resolved_layers(config)):
        by_options.setdefault(options, []).append(layer_index)
    stacked = {
        options: jax.vmap(functools.partial(_init_layer, config, options, key))(jnp.array(layer_indices, jnp.int32))
        for options, layer_indices in by_options.items()
    }
    if len(by_options) == 1:
        return Layers((Block(tuple(stacked.values()), config.depth, (None,)),))
    layers: dict[int, Layer] = {}
    for options, layer_indices in by_options.items():
        for i, layer_index in enumerate(layer_indices):
            layers[layer_index] = jax.tree.map(lambda a, i=i: a[i], stacked[options])
    return Layers.of([layers[layer_index] for layer_index in range(config.depth)])


def _init_layer(
    config: ModelConfig, options: tuple[AggregateConfig, MLPConfig | None], key: Key, layer_index: Any
) -> Layer:
    aggregate, filter = options
    key_aggregate, key_filter = jax.random.split(jax.random.fold_in(key, layer_index))
    sandwich = config.placement == "sandwich"
    return Layer(
        aggregate_norm=_init_norm(config),
        aggregate=aggregate.init(
            width=config.width, max_length=config.max_length, layer=layer_index, depth=config.depth, key=key_aggregate
        ),
        filter_norm=None if filter is None else _init_norm(config),
        filter=None if filter is None else _init_filter(filter, config, key_filter),
        placement=config.placement,
        aggregate_out_norm=_init_norm(config) if sandwich else None,
        filter_out_norm=_init_norm(config) if sandwich and filter is not None else None,
    )


def _init_norm(config: ModelConfig) -> Norm:
    if config.norm == "rms_norm":
        return RMSNorm.init(config.width, eps=config.norm_eps, unit_offset=config.norm_unit_offset)
    return LayerNorm.init(config.width, bias=config.norm_bias, scale=config.norm_scale, eps=config.norm_eps)


def _init_filter(config: MLPConfig, model: ModelConfig, key: Key) -> Filter:
    width, hidden = model.width, config.hidden or 4 * model.width
    key_gate, key_up, key_down = jax.random.split(key, 3)
    up = Linear.init(width, hidden, bias=config.bias, key=key_up)
    down = Linear.init(hidden, width, bias=config.bias, gain=1 / math.sqrt(2 * model.depth), key=key_down)
    if not config.gated:
        return MLP(up, down, config.activation)
    return GatedMLP(Linear.init(width, hidden, bias=config.bias, key=key_gate), up, down, config.activation)


def resolved_layers(config: ModelConfig) -> list[tuple[AggregateConfig, MLPConfig | None]]:
    """The aggregate config and the filter config (or None) of each layer, with names looked up and tuples cycled."""

    def cycle(choice: Any) -> list[Any]:
        choices = choice if isinstance(choice, tuple) else (choice,)
        return [choices[i % len(choices)] for i in range(config.depth)]

    aggregate_configs = [aggregates.config(a) if isinstance(a, str) else a for a in cycle(config.aggregate)]
    return list(zip(aggregate_configs, cycle(config.filter), strict=True))


def resolve(config: ModelConfig) -> ModelConfig:
    """`config` with every default made explicit, so that a change of defaults cannot alter the model."""
    layers = resolved_layers(config)
    return dataclasses.replace(
        config,
        aggregate=tuple(a for a, _ in layers) or config.aggregate,
        filter=tuple(f for _, f in layers) or config.filter,
    )


def astype(model: Transformer, dtype: Any) -> Transformer:
    """Convert the parameters of `model`, and so its computation, to `dtype`. Reductions stay in at least float32."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return model if {leaf.dtype for leaf in jax.tree.leaves(model)} <= {dtype} else _astype(model, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _astype(model: Transformer, dtype: Any) -> Transformer:
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, model)


def plain(model: Transformer) -> Transformer:
    """An equivalent model without fused kernels, so that all derivatives exist, including forward mode."""
    plain_layer = lambda layer: dataclasses.replace(layer, aggregate=layer.aggregate.plain())
    blocks = [
        dataclasses.replace(block, period=tuple(plain_layer(layer) for layer in block.period))
        for block in model.layers.blocks
    ]
    return dataclasses.replace(model, layers=Layers(tuple(blocks)))


def unrolled(model: Transformer) -> Transformer:
    """An equivalent model compiled layer by layer, without a scan: faster on CPU, but slower to compile."""
    return dataclasses.replace(model, layers=Layers.of(list(model.layers), unroll=True))
