"""A mixture of four hidden Markov sources: each path is of one of them, which its context has to tell.

python train.py configs/mixture.py
python analyze.py runs/mixture
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
