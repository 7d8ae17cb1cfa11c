"""The compiled programs of the command lines, kept in the user's cache folder, so that a second run compiles little."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

MAX_BYTES = 2**30
"""The size of the folder beyond which the least recently used programs are deleted."""


def enable_program_cache() -> None:
    """Keep compiled programs on disk, in the user's cache folder, from now on.

    What the user has configured has precedence: JAX_COMPILATION_CACHE_DIR is the folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps no programs. A folder that cannot be written is no error.
    """
    import jax
    import platformdirs

    config: Any = jax.config  # whose options are known to type checkers in some releases only
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir:
        return
    folder = platformdirs.user_cache_path("jaxwalk") / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    config.update("jax_compilation_cache_dir", str(folder))
    for option, value in (
        ("jax_compilation_cache_max_size", MAX_BYTES),
        (
            "jax_persistent_cache_min_compile_time_secs",
            0.1,
        ),  # small models compile many programs that take less than 1 s
    ):
        if option.upper() not in os.environ:
            config.update(option, value)


def _processor() -> str:
    """An identifier of the processor: programs are compiled for its instructions, and a home may be shared by many."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
