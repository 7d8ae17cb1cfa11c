"""Compiled programs are kept between runs of the command lines, where the user has not decided otherwise."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.monitoring
from jaxwalk._program_cache import enable_program_cache
enable_program_cache()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.eye(3)), len(hits))
"""


def run(folder, **changes):
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {
        "XDG_CACHE_HOME": str(folder),
        "HOME": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment | changes, capture_output=True, text=True, check=True)
    total, hits = done.stdout.split()
    assert float(total) == 3
    return int(hits), [path for path in folder.rglob("*-cache") if path.is_file()]


def test_a_second_run_reads_what_the_first_compiled(tmp_path):
    hits, programs = run(tmp_path)
    assert hits == 0
    assert programs
    hits, again = run(tmp_path)
    assert hits > 0
    assert {path.name for path in again} == {path.name for path in programs}


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_the_choice_of_the_user_has_precedence(tmp_path, name):
    elsewhere, home = tmp_path / "elsewhere", tmp_path / "home"
    home.mkdir()
    value = str(elsewhere) if name == "JAX_COMPILATION_CACHE_DIR" else "false"
    assert run(home, **{name: value}) == (0, [])
    assert elsewhere.exists() == (name == "JAX_COMPILATION_CACHE_DIR")


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "jaxwalk").write_text("a file in its place")
    assert run(tmp_path) == (0, [])
