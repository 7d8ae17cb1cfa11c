"""Settings that define a training run: data, optimizer, checkpoints, devices and the training loop."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxwalk.config._checked import Checked, at_least
from jaxwalk.config._model import ModelConfig


@dataclass(frozen=True)
class WorldData(Checked):
    """Paths sampled from a world, fresh at every step. `params` are arguments of the world's constructor."""

    world: str = "mess3"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextData(Checked):
    """Text documents, tokenised once into a memory-mapped store and packed with segment ids.

    `corpus` is "pydoc" (English text shipped with CPython, available offline), a local file, folder or glob (.txt,
    .jsonl, .parquet), or the name of a dataset on the Hugging Face hub.
    """

    corpus: str = "pydoc"
    subset: str | None = None
    """Configuration name of a hub dataset that has several."""
    split: str = "train"
    column: str = "text"
    streaming: bool = False
    """Fill the store from a stream, up to `max_tokens`, without downloading the whole corpus."""
    max_tokens: int | None = None
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocab_size: int = 257
    """Size of the vocabulary: 257 for bytes (256 and the begin-of-path token); the target size for BPE."""
    validation: float = 0.1
    """Fraction of the documents that is held out."""
    store: str = "runs/stores"
    """Folder of the tokenised stores. A store is reused by all runs with the same corpus and tokenizer."""

    def check(self) -> Iterable[str]:
        yield from at_least(self, max_tokens=1, vocab_size=257)
        if not 0 < self.validation < 1:
            yield f"validation: expected a share between 0 and 1, got {self.validation}"
        if self.streaming and self.max_tokens is None:
            yield "max_tokens: expected a number with streaming=True (a stream may have no end), got None"
        if self.tokenizer == "bytes" and self.vocab_size != 257:
            yield f"vocab_size: expected 257 with tokenizer='bytes', got {self.vocab_size}"


@dataclass(frozen=True)
class OptimConfig(Checked):
    """AdamW with a learning-rate schedule. Weight decay applies to matrices only."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: "cosine" decay; "wsd", constant with a linear decay at the end; or "constant"."""
    warmup: int = 100
    """Steps of linear warm-up from 0."""
    decay_share: float = 0.2
    """Fraction of all steps in which "wsd" decays."""
    final_lr: float = 0.1
    """Final learning rate as a fraction of `lr`."""
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float | None = 1.0
    """Largest global norm of the gradient; None disables clipping."""

    def check(self) -> Iterable[str]:
        yield from at_least(self, lr=0, warmup=0, final_lr=0, weight_decay=0, eps=0, clip=0)
        if not 0 <= self.decay_share <= 1:
            yield f"decay_share: expected a share between 0 and 1, got {self.decay_share}"
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: expected at least 0 and less than 1, got {getattr(self, name)}"


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """Which steps are saved: the union of the latest, the best and log-spaced ones. Step 0 is always saved."""

    every: int = 500
    """Steps between checkpoints that training can resume from."""
    latest: int = 2
    best: int = 1
    log_spaced: int = 10
    """Number of steps, evenly spaced in log(step), whose parameters are kept for `training_walk`."""

    def check(self) -> Iterable[str]:
        yield from at_least(self, every=1, latest=1, best=0, log_spaced=0)


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Mesh of devices: the batch is split `data` ways, parameters `model` ways. data=0 uses all remaining devices."""

    data: int = 0
    model: int = 1

    def check(self) -> Iterable[str]:
        yield from at_least(self, data=0, model=1)


@dataclass(frozen=True)
class TrainConfig(Checked):
    """A training run. The loss is -path_log_prob per predicted token; a path has `model.max_length` + 1 tokens."""

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
    """Gradient accumulation: the number of parts that the batch of a step is split into."""
    unroll: bool | None = None
    """Train with unrolled instead of scanned layers: faster on CPU, slower to compile. By default on CPU with up to 12
    layers. Results agree to rounding, and checkpoints do not depend on it."""
    steps_per_call: int = 10
    """Steps per jitted call. All intervals are multiples of it."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    log_every: int = 100
    eval_every: int = 500
    eval_batches: int = 8
    sample_every: int = 0
    """Steps between samples printed during the run; 0 disables them."""

    def check(self) -> Iterable[str]:
        yield from at_least(self, steps=1, batch_size=1, accumulate=1, steps_per_call=1, log_every=1, eval_every=1)
        yield from at_least(self, eval_batches=1, sample_every=0, seed=0)
        if self.steps_per_call >= 1:
            intervals = {
                "steps": self.steps,
                "log_every": self.log_every,
                "eval_every": self.eval_every,
                "sample_every": self.sample_every,
                "checkpoint.every": self.checkpoint.every,
            }
            for name, value in intervals.items():
                if value % self.steps_per_call:
                    yield f"{name}: expected a multiple of steps_per_call = {self.steps_per_call}, got {value}"
        if self.accumulate >= 1 and self.batch_size % self.accumulate:
            yield f"batch_size: expected a multiple of accumulate = {self.accumulate}, got {self.batch_size}"
