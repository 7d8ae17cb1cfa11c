"""The check that the worlds' parameters share."""

from typing import Any


def require(condition: bool, expected: str, **got: Any) -> None:
    """Raise ValueError, naming what was expected and got, unless `condition` holds."""
    if not condition:
        values = ", ".join(f"{name}={value!r}" for name, value in got.items())
        raise ValueError(f"expected {expected}, got {values}. Choose values for which this holds.")
