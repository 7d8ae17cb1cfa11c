"""How each aggregate grows with the length of the path: a forward and backward pass, and a step of decoding.

    python benchmarks/aggregates_cpu.py [attention mamba ...] [--lengths 64 128 256 512]

TABLE
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxwalk as jw

WIDTH, BATCH, ROUNDS, STEPS = 64, 8, 5, 64


def forward_and_backward(aggregate: Any, length: int) -> Callable[[], Any]:
    """The gradient of all parameters and inputs, for a batch of paths."""
    x = jax.random.normal(jax.random.key(1), (BATCH, length, WIDTH), jnp.float32)
    run = jax.jit(jax.grad(lambda a, x: jnp.sum(jax.vmap(a)(x) ** 2), (0, 1)))
    return lambda: jax.block_until_ready(run(aggregate, x))


def decoding(aggregate: Any, length: int) -> Callable[[], Any]:
    """The last `STEPS` steps of a path of `length`, for a batch."""
    x = jax.random.normal(jax.random.key(1), (BATCH, length, WIDTH), jnp.float32)
    first = length - STEPS
    state = jax.jit(jax.vmap(lambda x: aggregate.prefill(x[:first], length)[1]))(x)

    @jax.jit
    def run(state: Any, x: Any) -> Any:
        step = lambda state, x: jax.vmap(aggregate.step)(state, x)
        return jax.lax.scan(step, state, x[:, first:].swapaxes(0, 1))

    return lambda: jax.block_until_ready(run(state, x))


def fastest(runs: list[Callable[[], Any]]) -> list[float]:
    """The least seconds of each, taken in turns, so that what else the machine does falls on all alike."""
    for run in runs:
        run()
    seconds = np.full((ROUNDS, len(runs)), np.inf)
    for row in seconds:
        for n, run in enumerate(runs):
            start = time.perf_counter()
            run()
            row[n] = time.perf_counter() - start
    return seconds.min(0).tolist()


def main() -> None:
    """Measure, and print a table: milliseconds, and the exponent p of T^p between the two longest lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=jw.aggregates.names(), help="by default all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512])
    chosen = parser.parse_args()
    lengths = sorted(chosen.lengths)
    if len(lengths) < 2 or lengths[0] <= STEPS:
        parser.error(f"--lengths: expected at least two, all above {STEPS}, got {lengths}")
    heads = "".join(f"{n:>9}" for n in lengths)
    print(f"{'':24}{'forward and backward, ms':^{9 * len(lengths) + 6}}{'a step, us':^{9 * len(lengths) + 6}}  state")
    print(f"{'T =':24}{heads}{'~T^':>6}{heads}{'~T^':>6}{lengths[-1]:>9}{'~T^':>6}")
    longer = np.log(lengths[-1] / lengths[-2])
    growth = lambda values: np.log(values[-1] / values[-2]) / longer if values[-2] else 0.0
    for name in chosen.names:
        config = jw.aggregates.config(name)
        make = jax.jit(
            lambda key, n=lengths[-1], c=config: c.init(width=WIDTH, max_length=n, layer=0, depth=2, key=key)
        )
        aggregate = make(jax.random.key(0))
        trained = [1e3 * s for s in fastest([forward_and_backward(aggregate, n) for n in lengths])]
        decoded = [1e6 * s / STEPS for s in fastest([decoding(aggregate, n) for n in lengths])]
        sizes = [aggregate.state_size(n) for n in lengths]
        columns = "".join(
            "".join(f"{value:>9.2f}" for value in values) + f"{growth(values):>6.1f}" for values in (trained, decoded)
        )
        print(f"{name:24}{columns}{sizes[-1]:>9}{growth(sizes):>6.1f}", flush=True)


if __name__ == "__main__":
    main()
