"""Models: layers of aggregates and filters, their construction, their encoding walks and decoding."""

from jaxwalk.model.build import astype, init, plain, resolve, resolved_layers, unrolled
from jaxwalk.model.decoding import State, init_state, prefill, step
from jaxwalk.model.inputs import Index, Segments, Tokens
from jaxwalk.model.layer import Interventions, Layer, LayerWalk
from jaxwalk.model.mixing import Mixing
from jaxwalk.model.stack import Layers
from jaxwalk.model.transformer import Patch, Transformer, Walk, context_vector, encoding_walk

__all__ = [
    "Index",
    "Interventions",
    "Layer",
    "LayerWalk",
    "Layers",
    "Mixing",
    "Patch",
    "Segments",
    "State",
    "Tokens",
    "Transformer",
    "Walk",
    "astype",
    "context_vector",
    "encoding_walk",
    "init",
    "init_state",
    "plain",
    "prefill",
    "resolve",
    "resolved_layers",
    "step",
    "unrolled",
]
