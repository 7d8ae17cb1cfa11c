"""Byte-level English from CPython's own documentation, which needs no network: about 460 kB, another in each version.

    python train.py configs/pydoc.py
    python analyze.py runs/pydoc --prompt "The object "

On two CPU cores: 4 min, then 3 min. 2.01 bits per byte on held-out text in training's own evaluation; on the windows
that are analysed, each in one document, 2.00, where the best n-gram model has 2.45 and the untrained one 7.97. More
steps overfit, as the corpus is small. Only 7 of its held-out documents are as long as a window, too few to decide any
claim: train with --data.validation 0.2 for that. Another version of CPython has another text, and other numbers.
"""

from jaxwalk import ModelConfig, TextData, TrainConfig, aggregates
from jaxwalk.config import CheckpointConfig, MLPConfig, OptimConfig


def get_config() -> TrainConfig:
    """Four layers of width 128 on windows of 128 bytes."""
    return TrainConfig(
        name="pydoc",
        data=TextData("pydoc"),
        model=ModelConfig(
            vocab_size=257,
            max_length=128,
            width=128,
            depth=4,
            aggregate=aggregates.config("attention", heads=4, positions="rope"),
            filter=MLPConfig(hidden=512),
            positions="none",
            norm="rms_norm",
        ),
        optim=OptimConfig(lr=3e-3, warmup=100, weight_decay=0.1, final_lr=0.05),
        checkpoint=CheckpointConfig(every=400, log_spaced=8),
        batch_size=16,
        steps=1200,
        steps_per_call=10,
        log_every=100,
        eval_every=400,
        eval_batches=16,
        sample_every=400,
    )
