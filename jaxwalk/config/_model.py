"""Settings that define a model."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxwalk.config._checked import Checked, at_least


class AggregateConfig(Checked):
    """Base of all aggregate configs. `name` is the aggregate's file name in `jaxwalk/aggregates/`."""

    name: ClassVar[str]

    @classmethod
    def _title(cls) -> str:
        return cls.name

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> Any:
        """A freshly initialised aggregate for layer `layer` of `depth`.

        `layer` may be traced: layers that share a config are initialised by one vmapped program.
        """
        raise NotImplementedError


Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Placement = Literal["pre", "post", "parallel", "sandwich", "res_post"]
"""Where a layer applies its norms; see `jaxwalk.model.Layer`."""


@dataclass(frozen=True)
class LinearScaling(Checked):
    """Rotary frequencies divided by `factor`: position interpolation (Chen et al., arXiv 2306.15595)."""

    factor: float

    def check(self) -> Iterable[str]:
        yield from at_least(self, factor=1)


@dataclass(frozen=True)
class Llama3Scaling(Checked):
    """Low rotary frequencies divided by `factor`, high ones unchanged, those between interpolated (Llama 3.1).

    A frequency is low if it completes fewer than `low_freq_factor` turns within `original_length` positions, and high
    if it completes more than `high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    """The longest path that the unscaled frequencies were trained on."""

    def check(self) -> Iterable[str]:
        yield from at_least(self, factor=1, low_freq_factor=0, original_length=1)
        if not self.high_freq_factor > self.low_freq_factor:
            yield f"high_freq_factor: expected more than low_freq_factor, got {self.high_freq_factor}"


@dataclass(frozen=True)
class YarnScaling(Checked):
    """YaRN (Peng et al., arXiv 2309.00071): low frequencies divided by `factor`, high ones unchanged, a ramp between.

    A frequency is low if it completes at most `beta_slow` turns within `original_length` positions, and high if it
    completes at least `beta_fast`. The ramp is linear in the index of the frequency; `truncate` rounds its ends
    outwards to integers.
    """

    factor: float
    original_length: int
    """The longest path that the unscaled frequencies were trained on."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Factor applied to rotated queries and keys; by default 0.1 ln(factor) + 1."""
    truncate: bool = True

    def check(self) -> Iterable[str]:
        yield from at_least(self, factor=1, original_length=1, beta_slow=0, attention_factor=0)
        if not self.beta_fast > self.beta_slow:
            yield f"beta_fast: expected more than beta_slow, got {self.beta_fast}"


@dataclass(frozen=True)
class LongRopeScaling(Checked):
    """LongRoPE (Ding et al., arXiv 2402.13753): a separate divisor for each rotary frequency.

    Checkpoints have one set of factors for paths up to the original length and another for longer ones. A model here
    has a single set, fixed when it is built: if the length of the path selected the set, the context vectors of a
    prefix would depend on what follows it.
    """

    factors: tuple[float, ...]
    """One per pair of rotated channels."""
    attention_factor: float = 1.0
    """Factor applied to rotated queries and keys."""

    def check(self) -> Iterable[str]:
        yield from at_least(self, attention_factor=0)
        if not self.factors or not all(factor > 0 for factor in self.factors):
            yield f"factors: expected positive numbers, got {self.factors}"


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling
"""How rotary frequencies are rescaled to extend the context length."""


@dataclass(frozen=True)
class MLPConfig(Checked):
    """The position-wise filter of a layer: down(activation(up(x))), or down(activation(gate(x)) * up(x))."""

    hidden: int | None = None
    """Width of the hidden layer; 4 x width by default."""
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = True

    def check(self) -> Iterable[str]:
        yield from at_least(self, hidden=1)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A model: layers of (aggregate, filter) between an embedding and an unembedding.

    `aggregate` and `filter` are either one setting for all layers or a tuple that is cycled over the layers. An
    aggregate is given by its config, or by its name for the default config. With `filter=None`, layers have no filter.
    """

    vocab_size: int
    max_length: int
    width: int = 64
    depth: int = 4
    aggregate: str | AggregateConfig | tuple[str | AggregateConfig, ...] = "attention"
    filter: MLPConfig | tuple[MLPConfig | None, ...] | None = field(default_factory=MLPConfig)
    placement: Placement = "pre"
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_bias: bool = True
    """Applies to LayerNorm; RMSNorm never has a bias."""
    norm_scale: bool = True
    """Applies to LayerNorm, which has no parameters without scale and bias; RMSNorm always has a scale."""
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False
    """RMSNorm multiplies by 1 + scale, as in Gemma."""
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    position_offset: int = 0
    """Row of the learned table used for position 0, such as 2 in OPT. The table has max_length + position_offset rows.
    """
    embed_scale: float = 1.0
    """Factor applied to the rows of the embedding matrix, such as sqrt(width) in Gemma."""
    embed_norm: bool = False
    """Whether token vectors are normalised, as in BLOOM and RWKV. Position vectors are added afterwards."""
    tied: bool = False
    """Whether the output vectors are the rows of the embedding matrix."""
    unembed_bias: bool = False
    logit_softcap: float | None = None
    """Logits become cap * tanh(logits / cap), as in Gemma 2 (Bello et al., arXiv 1611.09940)."""
    remat: bool = False
    """Recompute each layer in the backward pass, which takes less memory and about a third more time."""

    def check(self) -> Iterable[str]:
        yield from at_least(self, vocab_size=1, max_length=1, width=1, depth=0, norm_eps=0, position_offset=0)
        for name in ("aggregate", "filter"):
            if getattr(self, name) == ():
                yield f"{name}: expected a choice, or a tuple of at least one, got ()"
        if self.norm_unit_offset and self.norm != "rms_norm":
            yield f"norm_unit_offset: expected norm = 'rms_norm', got {self.norm!r}"
        if not self.norm_scale and self.norm != "layer_norm":
            yield f"norm_scale: expected norm = 'layer_norm' where there is none, got {self.norm!r}"
        if self.position_offset and self.positions != "learned":
            yield f"position_offset: expected positions = 'learned', got {self.positions!r}"
        for name in ("embed_scale", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"{name}: expected more than 0, got {value}"
