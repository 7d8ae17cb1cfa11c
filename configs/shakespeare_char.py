"""nanoGPT's small CPU setting on Shakespeare, for comparison: 4 layers, 4 heads, width 128, 64 bytes, batch 12.

    python train.py configs/shakespeare_char.py                                # from the Hugging Face hub
    python train.py configs/shakespeare_char.py --data.corpus shakespeare.txt  # from a file of yours

nanoGPT states a validation loss of 1.88 nats a character for these choices after 2000 steps. Its corpus is ASCII, so
bytes are its characters; its vocabulary is the 65 that occur, ours the 256 bytes, and a single file is cut at 90% as
there. Not run by us: the corpus is on a hub.
"""

from jaxwalk import ModelConfig, TextData, TrainConfig, aggregates
from jaxwalk.config import CheckpointConfig, MLPConfig, OptimConfig


def get_config() -> TrainConfig:
    """nanoGPT's choices, on bytes."""
    return TrainConfig(
        name="shakespeare_char",
        data=TextData("karpathy/tiny_shakespeare"),
        model=ModelConfig(
            vocab_size=257,
            max_length=64,
            width=128,
            depth=4,
            aggregate=aggregates.config("attention", heads=4, bias=False),
            filter=MLPConfig(hidden=512, bias=False),
            norm_bias=False,
            tied=True,
        ),
        optim=OptimConfig(lr=1e-3, warmup=100, weight_decay=0.1, b2=0.99, final_lr=0.1),
        checkpoint=CheckpointConfig(every=500),
        batch_size=12,
        steps=2000,
        log_every=100,
        eval_every=500,
        eval_batches=20,
        sample_every=500,
    )
