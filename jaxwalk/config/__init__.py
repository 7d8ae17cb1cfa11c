"""Every choice a run is made of, as frozen dataclasses. Imports no jax, so that command lines start fast.

A config file returns one `TrainConfig`. The resolved tree is written to a run's `config.json` as data (`to_dict`) and
read back strictly (`from_dict`), so that a run's folder needs no Python file and no pickle. Values are checked when a
dataclass is made: wrong types and impossible choices raise `ConfigError`, which states the remedy.
"""

from jaxwalk.config._checked import Checked, ConfigError, at_least, fits, readable, unknown
from jaxwalk.config._data_form import from_dict, register_family, to_dict
from jaxwalk.config._model import (
    Activation,
    AggregateConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLPConfig,
    ModelConfig,
    Placement,
    RopeScaling,
    YarnScaling,
)
from jaxwalk.config._run import (
    CheckpointConfig,
    MeshConfig,
    OptimConfig,
    TextData,
    TrainConfig,
    WorldData,
)

FORMAT_VERSION = 2
"""Of `config.json` and of the definition beside a checkpoint. 2: layers are always stacked; `model.scan` is gone."""

__all__ = [
    "FORMAT_VERSION",
    "Activation",
    "AggregateConfig",
    "Checked",
    "CheckpointConfig",
    "ConfigError",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MLPConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Placement",
    "RopeScaling",
    "TextData",
    "TrainConfig",
    "WorldData",
    "YarnScaling",
    "at_least",
    "fits",
    "from_dict",
    "readable",
    "register_family",
    "to_dict",
    "unknown",
]
