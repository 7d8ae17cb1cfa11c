"""The choices that define a training run: data, optimizer, checkpoints, devices, and the loop itself."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxwalk.config._checked import Checked, at_least
from jaxwalk.config._model import ModelConfig


@dataclass(frozen=True)
class WorldData(Checked):
    """Paths sampled from a world, fresh at every step. `params` are the arguments of the world's constructor."""

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
        yield from at_least(self, max_tokens=1, vocab_size=257)
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
        yield from at_least(self, lr=0, warmup=0, final_lr=0, weight_decay=0, eps=0, clip=0)
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
        yield from at_least(self, every=1, latest=1, best=0, log_spaced=0)


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices: `data` ways of the batch times `model` ways of the parameters; data=0 takes all that are left."""

    data: int = 0
    model: int = 1

    def check(self) -> Iterable[str]:
        yield from at_least(self, data=0, model=1)


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
    """Gradient accumulation: the number of parts that a step's batch is split into."""
    unroll: bool | None = None
    """Train with the layers unrolled instead of scanned: faster on CPU, slower to compile. By default on CPU, up to 12
    layers. The result is the same to rounding, and so are the checkpoints."""
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
            for what, value in intervals.items():
                if value % self.steps_per_call:
                    yield f"{what}: expected a multiple of steps_per_call = {self.steps_per_call}, got {value}"
        if self.accumulate >= 1 and self.batch_size % self.accumulate:
            yield f"batch_size: expected a multiple of accumulate = {self.accumulate}, got {self.batch_size}"
