"""Worlds: data whose path law is known exactly, so that a model can be held against the truth.

One world is one file: `mess3.py` defines the function `mess3`, which returns a `World`; most are `HiddenMarkov`
ones, whose observer's beliefs are known too. Files that start with an underscore are not worlds. `names()` lists
what the folder holds; `make(name, **params)` builds a world from data, as a config or a checkpoint stores it;
`jaxwalk.worlds.mess3(x=0.05)` does so in code.
"""

import importlib
import inspect
import pkgutil
from typing import Any

from jaxwalk.config import ConfigError, unknown
from jaxwalk.worlds._grammar import Grammar
from jaxwalk.worlds._hidden_markov import Bounds, HiddenMarkov, MonteCarlo
from jaxwalk.worlds._world import World

# Importing a file `mess3.py` binds the name `mess3` of this package to the *module*; binding the function
# after every file has been imported is what makes `worlds.mess3(...)` a call whatever was imported before.
_WORLDS = {
    file.name: getattr(importlib.import_module(f"{__name__}.{file.name}"), file.name)
    for file in pkgutil.iter_modules(__path__)
    if not file.name.startswith("_")
}
globals().update(_WORLDS)

__all__ = ["Bounds", "Grammar", "HiddenMarkov", "MonteCarlo", "World", "make", "names", *_WORLDS]


def names() -> tuple[str, ...]:
    """The names of all worlds, sorted."""
    return tuple(sorted(_WORLDS))


def make(name: str, **params: Any) -> World:
    """The world called `name`, with the arguments of its function; `make(w.name, **w.params)` rebuilds `w`.

    Raises ConfigError for an unknown world or parameter (did you mean, and all there are), for a missing
    parameter, and for values with which the world is no process.
    """
    if name not in _WORLDS:
        raise ConfigError(unknown("world", name, _WORLDS))
    known = inspect.signature(_WORLDS[name]).parameters
    for param in params:
        if param not in known:
            if not known:
                raise ConfigError(f"world {name!r}: expected no parameters, got {param!r}. Leave it out.")
            raise ConfigError(unknown(f"parameter of world {name!r}", param, known))
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in params]
    if missing:
        raise ConfigError(
            f"world {name!r}: expected {', '.join(known)}, got no {', '.join(missing)}. Give each a value."
        )
    try:
        world = _WORLDS[name](**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"world {name!r}: {error}") from error
    if world.name != name or not params.keys() <= world.params.keys():
        raise ConfigError(
            f"world {name!r}: expected its file to return a World with name={name!r} and params={{...}}, all "
            f"its parameters, got name={world.name!r}, params={world.params}: a run could not be built again."
        )
    return world


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module 'jaxwalk.worlds': {unknown('name', name, __all__)}")
