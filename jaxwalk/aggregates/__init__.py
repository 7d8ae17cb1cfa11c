"""Aggregates: how positions are combined. One file each, found by its name; one contract, `Aggregate`.

A file `foo.py` here defines `Config`, an `AggregateConfig` with `name = "foo"`, whose `init` makes the module.
That is all there is to adding one: the tests discover it and hold it to every law of the contract. It may lie in any
folder that is appended to `jaxwalk.aggregates.__path__`.

FNet (Lee-Thorp et al., arXiv 2105.03824) is not here: a Fourier transform over positions lets every position see the
future, and cut to be causal it would no longer be FNet. `linear_mixer` and `fixed_mixing` mix by position alone.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from jaxwalk.config import AggregateConfig, ConfigError, unknown

if TYPE_CHECKING:
    from jaxwalk.aggregates._contract import Aggregate

__all__ = ["Aggregate", "AggregateConfig", "config", "config_class", "names"]


def names() -> tuple[str, ...]:
    """The names of all aggregates."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def config_class(name: str) -> type[AggregateConfig]:
    """The config class of the aggregate `name`. Raises ConfigError if there is none."""
    if name not in names():
        raise ConfigError(unknown("aggregate", name, names()))
    return importlib.import_module(f"{__name__}.{name}").Config


def config(name: str, **choices: Any) -> AggregateConfig:
    """The config of the aggregate `name` with `choices`. Raises ConfigError for an unknown name, choice or value."""
    from jaxwalk.config import from_dict

    return from_dict(config_class(name), choices)


def __getattr__(name: str) -> Any:
    if name == "Aggregate":
        return importlib.import_module("jaxwalk.aggregates._contract").Aggregate
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
