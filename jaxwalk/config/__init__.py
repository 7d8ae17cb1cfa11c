"""All settings of a run as frozen dataclasses. Does not import jax, so that command lines start fast.

A config file returns one `TrainConfig`. Its resolved form is written to the run's `config.json` as data (`to_dict`) and
read back strictly (`from_dict`), so that a run's folder needs neither Python files nor pickles. Values are checked on
construction: a wrong type or an impossible value raises `ConfigError`, whose message says how to fix it.
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
"""Version of `config.json` and of the definition in a checkpoint. 2: layers are always stacked; `model.scan` is gone.
"""

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
