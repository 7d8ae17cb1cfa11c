"""TinyStories (Eldan and Li, arXiv 2305.07759) with a BPE vocabulary, for one accelerator.

    python train.py configs/tinystories.py
    python analyze.py runs/tinystories --prompt "Once upon a time"

The corpus comes from the Hugging Face hub, as a stream that fills the store with 200 million tokens. Not run by us yet:
it needs a network and an accelerator.
"""

from jaxwalk import ModelConfig, TextData, TrainConfig, aggregates
from jaxwalk.config import CheckpointConfig, MLPConfig, OptimConfig


def get_config() -> TrainConfig:
    """Eight layers of width 512, gated filters, RoPE, bfloat16."""
    return TrainConfig(
        name="tinystories",
        data=TextData(
            "roneneldan/TinyStories",
            streaming=True,
            max_tokens=200_000_000,
            tokenizer="bpe",
            vocab_size=4096,
            validation=0.01,
        ),
        model=ModelConfig(
            vocab_size=4096,
            max_length=512,
            width=512,
            depth=8,
            aggregate=aggregates.config("attention", heads=8, positions="rope", bias=False, kernel="xla"),
            filter=MLPConfig(hidden=1408, activation="silu", gated=True, bias=False),
            norm="rms_norm",
            positions="none",
            tied=True,
        ),
        optim=OptimConfig(lr=1e-3, schedule="wsd", warmup=500, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=1000, log_spaced=16),
        batch_size=64,
        steps=20_000,
        compute_dtype="bfloat16",
        log_every=100,
        eval_every=1000,
        eval_batches=16,
        sample_every=1000,
    )
