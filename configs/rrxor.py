"""RRXOR: two random bits, then their exclusive or, over and over; the reader must find the phase (36 belief states).

    python train.py configs/rrxor.py
    python analyze.py runs/rrxor

On two CPU cores: 2 min, then two minutes. Excess loss 0.0020 nats per token (untrained 0.16, the best n-gram model
0.0083), and 0.0013 of the model's mass lies on paths that the world forbids. The belief is spread over the stations:
all of them together hold it with R² 0.75, the context vector alone with 0.60 (untrained 0.07), the exact next-token law
with 0.23 and its logarithm with 0.44 only.
"""

from jaxwalk import ModelConfig, TrainConfig, WorldData, aggregates
from jaxwalk.config import CheckpointConfig, MLPConfig, OptimConfig


def get_config() -> TrainConfig:
    """Four layers of width 64 on paths of 16 tokens."""
    return TrainConfig(
        name="rrxor",
        data=WorldData("rrxor"),
        model=ModelConfig(
            vocab_size=2,
            max_length=16,
            width=64,
            depth=4,
            aggregate=aggregates.config("attention", heads=4),
            filter=MLPConfig(hidden=256),
        ),
        optim=OptimConfig(lr=2e-3, warmup=100, weight_decay=0.01, final_lr=0.01),
        checkpoint=CheckpointConfig(every=500, log_spaced=10),
        batch_size=128,
        steps=3000,
        log_every=100,
        eval_every=500,
    )
