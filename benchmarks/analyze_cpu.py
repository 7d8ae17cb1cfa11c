"""What `analyze.py` costs on the quickstart: CPU-seconds and compiled programs, of this commit beside another one.

    git worktree add ../before 1632d0b
    python benchmarks/analyze_cpu.py runs/mess3 --against ../before

Each commit analyses the run in a fresh process: without a compilation cache, and, where the commit keeps one, a second
time with what the first left in it. The report is timed inside the process. Programs are counted by JAX's own log of
compilations.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import logging, os, resource, runpy, sys, time
import jax
compiled = []
class Count(logging.Handler):
    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Finished XLA compilation"):
            compiled.append(message)
jax.config.update("jax_log_compiles", True)
for name in ("jax._src.dispatch", "jax._src.interpreters.pxla"):
    logger = logging.getLogger(name)
    logger.addHandler(Count()); logger.propagate = False
from jaxwalk import report
inner, spent = report.write, []
def write(*arguments, **options):
    start = time.process_time()
    result = inner(*arguments, **options)
    spent.append(time.process_time() - start)
    return result
report.write = write
sys.argv = ["analyze.py", *sys.argv[1:]]
try:
    runpy.run_path("analyze.py", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
usage = resource.getrusage(resource.RUSAGE_SELF)
print("COST", len(compiled), usage.ru_utime + usage.ru_stime, sum(spent), usage.ru_maxrss / 1024)
"""


def cost(tree: Path, run: Path, out: Path, cache: Path | None) -> tuple[int, float, float, float]:
    """Programs, CPU-seconds in all, CPU-seconds of the report, and MiB, of one analysis by the commit in `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", SCRIPT, str(run.resolve()), "--out", str(out)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"^COST (\d+) (\S+) (\S+) (\S+)$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise SystemExit(f"{tree}: {done.stderr[-2000:]}")
    return int(found[1]), float(found[2]), float(found[3]), float(found[4])


def main() -> None:
    """Analyse the run by each commit, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a trained run")
    parser.add_argument("--against", type=Path, help="the source tree of another commit")
    arguments = parser.parse_args()
    trees = {"this": Path(__file__).resolve().parent.parent}
    if arguments.against:
        trees["other"] = arguments.against.resolve()
    print(f"{'commit':8}{'cache':8}{'programs':>10}{'CPU-s':>8}{'report':>8}{'MiB':>7}")
    for name, tree in trees.items():
        with tempfile.TemporaryDirectory() as folder:
            for label, cache in (("none", None), ("cold", Path(folder, "cache")), ("warm", Path(folder, "cache"))):
                programs, seconds, report, memory = cost(tree, arguments.run, Path(folder, "out"), cache)
                print(f"{name:8}{label:8}{programs:>10}{seconds:>8.1f}{report:>8.1f}{memory:>7.0f}", flush=True)


if __name__ == "__main__":
    main()
