"""Associative recall: pairs of a key and a value, where a key that comes again brings the same value again.

    python train.py configs/associative_recall.py
    python analyze.py runs/associative_recall

On two CPU cores: about 2 min, then two minutes. Excess loss 0.039 nats per token and still falling (untrained 1.2, the
best n-gram model 0.32): what is recalled depends on which key it is, so that no fixed pattern of mixing will do (the
best one in place of the model's own costs 0.94 nats per token).
"""

from jaxwalk import ModelConfig, TrainConfig, WorldData, aggregates
from jaxwalk.config import CheckpointConfig, MLPConfig, OptimConfig


def get_config() -> TrainConfig:
    """Two layers of width 64 on paths of 24 tokens, 12 pairs."""
    return TrainConfig(
        name="associative_recall",
        data=WorldData("associative_recall", {"keys": 8, "values": 8}),
        model=ModelConfig(
            vocab_size=16,
            max_length=24,
            width=64,
            depth=2,
            aggregate=aggregates.config("attention", heads=4, positions="rope"),
            filter=MLPConfig(hidden=256),
        ),
        optim=OptimConfig(lr=3e-3, warmup=100, weight_decay=0.01, final_lr=0.01),
        checkpoint=CheckpointConfig(every=500, log_spaced=10),
        batch_size=128,
        steps=3000,
        log_every=100,
        eval_every=500,
        eval_batches=4,
    )
