"""Training: batches, the loss, one donated jitted call on a mesh, and the loop around it.

`train` runs the whole loop in a folder. `make_batches`, `make_state`, `make_call` and `make_evaluation` are its parts:

    config = resolve(config)
    mesh, batches, update = make_mesh(config.mesh), make_batches(config), optimizer(config.optim, config.steps)
    state = make_state(config, update, mesh)
    call = make_call(config, batches, update, mesh, state)
    leaves, metrics = call(jax.tree.leaves(state), batches.inputs(0, config.steps_per_call))

The loss is exactly -`path_log_prob` per predicted token, so analysis measures what training optimised. Batches are a
pure function of (seed, step), so resumption needs no iterator state: a resumed run reaches the same parameters, bit for
bit, as an uninterrupted one.
"""

from jaxwalk.training._data import TextBatches, WorldBatches, make_batches
from jaxwalk.training._evaluation import make_evaluation
from jaxwalk.training._loop import resolve, train
from jaxwalk.training._progress import TrainingDiverged
from jaxwalk.training._step import (
    State,
    batch_loss,
    initial_state,
    make_call,
    make_mesh,
    make_state,
    optimizer,
    schedule,
    train_step,
)

__all__ = [
    "State",
    "TextBatches",
    "TrainingDiverged",
    "WorldBatches",
    "batch_loss",
    "initial_state",
    "make_batches",
    "make_call",
    "make_evaluation",
    "make_mesh",
    "make_state",
    "optimizer",
    "resolve",
    "schedule",
    "train",
    "train_step",
]
