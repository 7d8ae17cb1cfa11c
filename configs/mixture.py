"""A mixture of four hidden Markov sources: each path is of one of them, which its context has to tell.

    python train.py configs/mixture.py
    python analyze.py runs/mixture

About a minute of two CPU cores. Late in a path (the last 8 of 32 positions) the model is 0.0057 nats per token from the
exact posterior over the sources (untrained 0.13); an observer of the last 8 tokens is 0.041 from it, one who never
updates the probabilities of the sources 0.095, the best single source 0.15. A shuffled context leaves 0.056 nats more
open about the next three tokens (0.062 to the observer who knows the world). So C3, that context narrows, is supported.
"""

from jaxwalk import ModelConfig, TrainConfig, WorldData, aggregates
from jaxwalk.config import CheckpointConfig, MLPConfig, OptimConfig


def get_config() -> TrainConfig:
    """Three layers of width 64 on paths of 32 tokens."""
    return TrainConfig(
        name="mixture",
        data=WorldData("mixture"),
        model=ModelConfig(
            vocab_size=3,
            max_length=32,
            width=64,
            depth=3,
            aggregate=aggregates.config("attention", heads=4),
            filter=MLPConfig(hidden=256),
        ),
        optim=OptimConfig(lr=3e-3, warmup=50, weight_decay=0.01, final_lr=0.01),
        checkpoint=CheckpointConfig(every=200, log_spaced=8),
        batch_size=128,
        steps=800,
        steps_per_call=10,
        log_every=50,
        eval_every=100,
        eval_batches=4,
    )
