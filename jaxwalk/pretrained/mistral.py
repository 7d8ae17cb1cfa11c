"""Mistral (Jiang et al., arXiv 2310.06825): Llama with a window that slides in all layers, or in none.

No GGUF of its own: llama.cpp writes it as "llama", and without its window, so that a file of a model that has one
gives other context vectors than transformers beyond its width, here as in llama.cpp.
"""

from jaxwalk.config import ModelConfig
from jaxwalk.pretrained import llama
from jaxwalk.pretrained._family import Family, Keys
from jaxwalk.pretrained._rope import rope


def config(keys: Keys) -> ModelConfig:
    """As Llama, without biases."""
    positions = rope(keys, keys("max_position_embeddings"))
    aggregate = llama.heads(keys, positions, window=keys.nullable("sliding_window", 4096), bias=False)
    return llama.model(keys, positions, aggregate, llama.activation(keys))


FAMILY = Family(model_types=("mistral",), config=config, tensors=llama.tensors, prefix="model.", ignored=llama.COMPUTED)
