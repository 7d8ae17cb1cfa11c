"""Pretrained families beside Hugging Face's transformers: the largest error of each case of the parity tests.

    python benchmarks/parity.py [CASE ...]

Needs the extra `hf` (torch, transformers). Without names all cases are run, and the table is written to
benchmarks/parity.md; with names it is only printed. The cases, and what is compared, are those of
tests/test_parity_pretrained.py: tiny models of every family, whose every parameter is random.
"""

import argparse
import datetime
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

HEADER = """# Parity with transformers

Made by `python benchmarks/parity.py` on {date}: Python {python}, {versions},
in float32 on {device}.

Each row is a tiny model of a family, every parameter random, that transformers saved and jaxwalk loaded, on a path of
{T} tokens. Errors are the largest absolute differences between the two: of log-probabilities in nats, and of every
hidden state, from the token vectors (where transformers gives them) over the layers to the context vectors after the
final norm. That of gradients, of a path's log-probability for its token vectors, is a share of the largest gradient.
The tests ask for 1e-4, 1e-4 and 1e-3.

| case | model type | log-probabilities | hidden states | gradients |
|---|---|---|---|---|
"""


def largest(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference. NaN is as large as can be."""
    return float(np.max(np.abs(np.asarray(got, np.float64) - expected)))


def row(name: str) -> str:
    """One case's line of the table."""
    from tests import test_parity_pretrained as parity

    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = parity.made(name, Path(folder))
    log_probs, states = parity.log_probs_and_states(theirs, ours, parity.tokens())
    got, expected = parity.gradients(theirs, ours, parity.tokens(1))
    each = " ".join(f"{largest(*pair):.0e}" for pair in states)
    share = largest(got, expected) / np.abs(expected).max()
    return f"| {name} | `{theirs.config.model_type}` | {largest(*log_probs):.1e} | {each} | {share:.1e} |"


def main() -> int:
    """Print the table, and write it if it is whole. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all")
    chosen = parser.parse_args().cases
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        print(f"parity.py: {error}. Install the extra: pip install 'jaxwalk[hf]'", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from tests.test_parity_pretrained import CASES, T

    if wrong := [name for name in chosen if name not in CASES]:
        parser.error(f"expected cases of {', '.join(map(repr, CASES))}, got {', '.join(map(repr, wrong))}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "transformers", "torch"))
    table = HEADER.format(
        date=datetime.date.today(),
        python=".".join(map(str, sys.version_info[:3])),
        versions=versions,
        device=jax.default_backend().upper(),
        T=T,
    )
    print(table, end="")
    for name in chosen or CASES:
        table += (line := row(name)) + "\n"
        print(line, flush=True)
    if not chosen:
        (ROOT / "benchmarks" / "parity.md").write_text(table, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
