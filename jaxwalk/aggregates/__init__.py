"""Aggregates: combinations of positions. One family per file, discovered by name, all with the interface `Aggregate`.

To add a family, create a file `foo.py` here, or in any folder that is appended to `jaxwalk.aggregates.__path__`. It
defines `Config`, an `AggregateConfig` with `name = "foo"`, whose `init` returns the module. The tests discover the file
and check every law of the interface.

FNet (Lee-Thorp et al., arXiv 2105.03824) is not included: its Fourier transform over positions lets every position see
the future, and a causal version would no longer be FNet. `linear_mixer` and `fixed_mixing` mix by position alone.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from jaxwalk.config import AggregateConfig, ConfigError, from_dict, register_family, unknown

if TYPE_CHECKING:
    from jaxwalk.aggregates._contract import Aggregate

__all__ = ["Aggregate", "AggregateConfig", "config", "config_class", "names"]


def names() -> tuple[str, ...]:
    """The names of all aggregates, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def config_class(name: str) -> type[AggregateConfig]:
    """The config class of the aggregate `name`.

    Raises:
        ConfigError: if there is no such aggregate.
    """
    if name not in names():
        raise ConfigError(unknown("aggregate", name, names()))
    return importlib.import_module(f"{__name__}.{name}").Config


def config(name: str, **choices: Any) -> AggregateConfig:
    """The config of the aggregate `name`, with `choices` in place of its defaults.

    Raises:
        ConfigError: if the name, a choice or its value is unknown.
    """
    return from_dict(config_class(name), choices)


register_family("aggregates", config_class)


def __getattr__(name: str) -> Any:
    if name == "Aggregate":
        return importlib.import_module("jaxwalk.aggregates._contract").Aggregate
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
