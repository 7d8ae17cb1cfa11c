"""Every choice a run is made of, as frozen dataclasses. Imports no jax, so command lines start fast.

A config file returns one `TrainConfig`. The resolved tree is written to a run's `config.json` as data
(`to_dict`) and read back strictly (`from_dict`), so a run's folder needs no Python file and no pickle.
Values are checked when a dataclass is made: wrong types and impossible choices raise, with the remedy.
"""

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

FORMAT_VERSION = 1


class ConfigError(ValueError):
    """A config that cannot be: says what was expected, what was got, and the remedy."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> str:
    """The message for a name that is none of `choices`: did you mean, and all there are."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Choices: {', '.join(choices)}."


def fits(value: Any, annotation: Any) -> bool:
    """Whether `value` is of type `annotation`, for the annotations that the configs here use."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(v, args[0]) for v in value)
    if origin is not None:
        return isinstance(value, origin)
    if annotation in (None, type(None)):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def readable(annotation: Any) -> str:
    """A type as messages name it."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


class Checked:
    """Base of every config: types are checked when it is made; `check` adds what types cannot say."""

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """Refuses unknown fields, with the closest known one, before the dataclass would with less to say."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in fields:
            if name not in names:
                raise ConfigError(unknown(f"field of {cls._title()}", name, names))
        return super().__new__(cls)

    @classmethod
    def _title(cls) -> str:
        return cls.__name__

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        wrong = [
            f"{f.name}: expected {readable(hints[f.name])}, got {getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if not fits(getattr(self, f.name), hints[f.name])
        ]
        wrong = wrong or list(self.check())
        if wrong:
            raise ConfigError(f"{self._title()}: " + "; ".join(wrong) + ".")

    def check(self) -> Iterable[str]:
        """Yield what is wrong with the values, all of it at once."""
        return ()


def _at_least(config: Any, **least: float) -> Iterable[str]:
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:  # so that NaN is refused too
            yield f"{name}: expected at least {bound}, got {value}"


class AggregateConfig(Checked):
    """Base of every aggregate's config. `name` is the aggregate's file name in `jaxwalk/aggregates/`."""

    name: ClassVar[str]

    @classmethod
    def _title(cls) -> str:
        return cls.name

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> Any:
        """The aggregate with fresh parameters, for layer number `layer` of `depth`."""
        raise NotImplementedError


Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Placement = Literal["pre", "post", "parallel", "sandwich", "res_post"]
"""Where a layer's norms are: see `Layer`."""


@dataclass(frozen=True)
class LinearScaling(Checked):
    """Rotary frequencies divided by `factor`: position interpolation (Chen et al., arXiv 2306.15595)."""

    factor: float

    def check(self) -> Iterable[str]:
        yield from _at_least(self, factor=1)


@dataclass(frozen=True)
class Llama3Scaling(Checked):
    """Rotary frequencies divided by `factor` where low, kept where high, and blended between (Llama 3.1).

    Low: fewer than `low_freq_factor` turns within `original_length` positions. High: more than `high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    """The longest path before the scaling."""

    def check(self) -> Iterable[str]:
        yield from _at_least(self, factor=1, low_freq_factor=0, original_length=1)
        if not self.high_freq_factor > self.low_freq_factor:
            yield f"high_freq_factor: expected more than low_freq_factor, got {self.high_freq_factor}"


@dataclass(frozen=True)
class YarnScaling(Checked):
    """YaRN (Peng et al., arXiv 2309.00071): frequencies divided by `factor` where low, kept where high; a ramp between.

    Low: at most `beta_slow` turns within `original_length` positions. High: at least `beta_fast`. The ramp is linear in
    the number of the frequency, and `truncate` says whether its ends are rounded outwards to whole ones.
    """

    factor: float
    original_length: int
    """The longest path before the scaling."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """What rotated queries and keys are multiplied by; by default 0.1 ln(factor) + 1."""
    truncate: bool = True

    def check(self) -> Iterable[str]:
        yield from _at_least(self, factor=1, original_length=1, beta_slow=0, attention_factor=0)
        if not self.beta_fast > self.beta_slow:
            yield f"beta_fast: expected more than beta_slow, got {self.beta_fast}"


@dataclass(frozen=True)
class LongRopeScaling(Checked):
    """LongRoPE (Ding et al., arXiv 2402.13753): each rotary frequency divided by a factor of its own.

    A checkpoint has a set for paths up to its original length and another for longer ones. A model has one of them,
    chosen when it is made: if a path's length chose, a prefix would have other context vectors than within its path.
    """

    factors: tuple[float, ...]
    """One for each pair of rotated channels."""
    attention_factor: float = 1.0
    """What rotated queries and keys are multiplied by."""

    def check(self) -> Iterable[str]:
        yield from _at_least(self, attention_factor=0)
        if not self.factors or not all(factor > 0 for factor in self.factors):
            yield f"factors: expected positive numbers, got {self.factors}"


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling
"""How rotary frequencies are changed so that paths may be longer than those first trained on."""


@dataclass(frozen=True)
class MLPConfig(Checked):
    """The position-wise filter of a layer: down(activation(up(x))), or down(activation(gate(x)) * up(x))."""

    hidden: int | None = None
    """Width of the hidden layer; by default 4 x width."""
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = True

    def check(self) -> Iterable[str]:
        yield from _at_least(self, hidden=1)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A model: layers of (aggregate, filter) between an embedding and an unembedding.

    `aggregate` and `filter` are one choice for all layers, or a tuple that is cycled over the layers.
    An aggregate is its config, or its name for the defaults. A filter may be None: the layer has none.
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
    """Of LayerNorm; RMSNorm has none."""
    norm_scale: bool = True
    """Of LayerNorm; without it and without a bias it has no parameters. RMSNorm has one always."""
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False
    """RMSNorm multiplies by 1 + scale instead of scale, as in Gemma."""
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    position_offset: int = 0
    """Row of the learned table that position 0 has: 2 in OPT. The table has max_length + position_offset rows."""
    embed_scale: float = 1.0
    """What rows of the embedding matrix are multiplied by to be token vectors: sqrt(width) in Gemma."""
    embed_norm: bool = False
    """Whether they are normed, too, to be token vectors: in BLOOM and RWKV. Positions are added after it."""
    tied: bool = False
    """Whether the output vectors are the rows of the embedding matrix."""
    unembed_bias: bool = False
    logit_softcap: float | None = None
    """Logits become cap * tanh(logits / cap), as in Gemma 2 (Bello et al., arXiv 1611.09940)."""
    scan: bool | None = None
    """Compile one period of layers and scan over it; by default when there are more than 12 layers."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, a third more time."""

    def check(self) -> Iterable[str]:
        yield from _at_least(self, vocab_size=1, max_length=1, width=1, depth=0, norm_eps=0, position_offset=0)
        for what in ("aggregate", "filter"):
            if getattr(self, what) == ():
                yield f"{what}: expected a choice, or a tuple of at least one, got ()"
        if self.norm_unit_offset and self.norm != "rms_norm":
            yield f"norm_unit_offset: expected norm = 'rms_norm', got {self.norm!r}"
        if not self.norm_scale and self.norm != "layer_norm":
            yield f"norm_scale: expected norm = 'layer_norm' where there is none, got {self.norm!r}"
        if self.position_offset and self.positions != "learned":
            yield f"position_offset: expected positions = 'learned', got {self.positions!r}"
        for what in ("embed_scale", "logit_softcap"):
            value = getattr(self, what)
            if value is not None and not value > 0:
                yield f"{what}: expected more than 0, got {value}"


@dataclass(frozen=True)
class WorldData(Checked):
    """Paths sampled from a world, fresh at every step. `params` are the arguments of the world's function."""

    world: str = "mess3"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextData(Checked):
    """Text documents, tokenised once into a memory-mapped store and packed with segment ids.

    `corpus` is "pydoc" (English that ships inside CPython, needs no network), a local file, folder or glob
    (.txt, .jsonl, .parquet), or the name of a dataset on the Hugging Face hub.
    """

    corpus: str = "pydoc"
    subset: str | None = None
    """Configuration name of a hub dataset, where it has several."""
    split: str = "train"
    column: str = "text"
    streaming: bool = False
    """Fill the store from a stream, up to `max_tokens`, without downloading the whole corpus."""
    max_tokens: int | None = None
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocab_size: int = 257
    """Size of the vocabulary: 257 for bytes (256 and the begin-of-path token); the target size for BPE."""
    validation: float = 0.1
    """Share of the documents that is held out."""
    store: str = "runs/stores"
    """Folder of the tokenised stores; one corpus and tokenizer is tokenised once."""

    def check(self) -> Iterable[str]:
        yield from _at_least(self, max_tokens=1, vocab_size=257)
        if not 0 < self.validation < 1:
            yield f"validation: expected a share between 0 and 1, got {self.validation}"
        if self.streaming and self.max_tokens is None:
            yield "max_tokens: expected a number with streaming=True (a stream may have no end), got None"
        if self.tokenizer == "bytes" and self.vocab_size != 257:
            yield f"vocab_size: expected 257 with tokenizer='bytes', got {self.vocab_size}"


@dataclass(frozen=True)
class OptimConfig(Checked):
    """AdamW with a learning-rate schedule. Weight decay acts on matrices only."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay; warm-up, stable, linear decay; or constant."""
    warmup: int = 100
    """Steps of linear warm-up from 0."""
    decay_share: float = 0.2
    """Share of the steps in which "wsd" decays."""
    final_lr: float = 0.1
    """Last learning rate as a share of `lr`."""
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float | None = 1.0
    """Largest global norm of a gradient; None for no clipping."""

    def check(self) -> Iterable[str]:
        yield from _at_least(self, lr=0, warmup=0, final_lr=0, weight_decay=0, eps=0, clip=0)
        if not 0 <= self.decay_share <= 1:
            yield f"decay_share: expected a share between 0 and 1, got {self.decay_share}"
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: expected at least 0 and less than 1, got {getattr(self, name)}"


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """Which steps are kept: the union of the latest, the best, and log-spaced ones. Step 0 always is."""

    every: int = 500
    """Steps between checkpoints from which the run can resume."""
    latest: int = 2
    best: int = 1
    log_spaced: int = 10
    """How many steps, spaced evenly in log(step), keep their parameters for `training_walk`."""

    def check(self) -> Iterable[str]:
        yield from _at_least(self, every=1, latest=1, best=0, log_spaced=0)


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices: `data` ways of the batch times `model` ways of the parameters; data=0 takes all that are left."""

    data: int = 0
    model: int = 1

    def check(self) -> Iterable[str]:
        yield from _at_least(self, data=0, model=1)


@dataclass(frozen=True)
class TrainConfig(Checked):
    """A whole run. The loss is -path_log_prob per predicted token; a path has `model.max_length` + 1 tokens."""

    name: str
    model: ModelConfig
    data: WorldData | TextData
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 2000
    batch_size: int = 64
    """Paths per step, over all devices and accumulation steps."""
    accumulate: int = 1
    """Gradient accumulation: a step's batch is split in so many parts."""
    steps_per_call: int = 10
    """Steps in one jitted call. All intervals are multiples of it."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    log_every: int = 100
    eval_every: int = 500
    eval_batches: int = 8
    sample_every: int = 0
    """Steps between samples printed during the run; 0 for none."""

    def check(self) -> Iterable[str]:
        yield from _at_least(self, steps=1, batch_size=1, accumulate=1, steps_per_call=1, log_every=1, eval_every=1)
        yield from _at_least(self, eval_batches=1, sample_every=0, seed=0)
        if self.steps_per_call >= 1:
            intervals = {
                "steps": self.steps,
                "log_every": self.log_every,
                "eval_every": self.eval_every,
                "sample_every": self.sample_every,
                "checkpoint.every": self.checkpoint.every,
            }
            for what, value in intervals.items():
                if value % self.steps_per_call:
                    yield f"{what}: expected a multiple of steps_per_call = {self.steps_per_call}, got {value}"
        if self.accumulate >= 1 and self.batch_size % self.accumulate:
            yield f"batch_size: expected a multiple of accumulate = {self.accumulate}, got {self.batch_size}"


# Data form. Where a field can hold one of several dataclasses, the dict says which under "kind".

_KINDS = {c.__name__: c for c in (MLPConfig, WorldData, TextData, *typing.get_args(RopeScaling))}


def to_dict(config: Any) -> Any:
    """The config as plain JSON data, every field written out."""
    if isinstance(config, AggregateConfig):
        return {"kind": f"aggregates.{config.name}", **_fields(config)}
    if type(config).__name__ in _KINDS:
        return {"kind": type(config).__name__, **_fields(config)}
    if dataclasses.is_dataclass(config):
        return _fields(config)
    if isinstance(config, tuple | list):
        return [to_dict(c) for c in config]
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    return config


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type, data: Mapping[str, Any]) -> Any:
    """The config of class `cls` from `to_dict`'s data. Unknown fields raise, with the closest known one."""
    data = dict(data)
    data.pop("kind", None)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in data:
        if name not in names:
            raise ConfigError(unknown(f"field of {getattr(cls, 'name', cls.__name__)}", name, names))
    try:
        return cls(**{name: _value(hints[name], value) for name, value in data.items()})
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}. Got fields {', '.join(data) or 'none'}.") from error


def _value(annotation: Any, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(Any, v) for v in value)
    if isinstance(value, Mapping) and "kind" in value:
        kind = value["kind"]
        if kind.startswith("aggregates."):
            aggregates = importlib.import_module("jaxwalk.aggregates")
            return from_dict(aggregates.config_class(kind.removeprefix("aggregates.")), value)
        if kind not in _KINDS:
            raise ConfigError(unknown("kind of config", kind, _KINDS))
        return from_dict(_KINDS[kind], value)
    if isinstance(value, Mapping) and dataclasses.is_dataclass(annotation):
        return from_dict(typing.cast(type, annotation), value)
    return value
