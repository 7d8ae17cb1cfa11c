"""Seconds until `train.py --help` and `analyze.py --help` answer, beside a bare `import numpy`.

python benchmarks/start_up.py
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def seconds(*command: str) -> float:
    """The fastest of seven runs, in turns with nothing else."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    bare = seconds("-c", "import numpy")
    print(f"import numpy          {bare:.2f} s")
    for script in ("train.py", "analyze.py"):
        print(f"{script + ' --help':22}{seconds(script, '--help'):.2f} s")
