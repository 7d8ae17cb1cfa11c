"""How each aggregate grows with the length of the path: a forward and backward pass, and a step of decoding.

    python benchmarks/aggregates_cpu.py [attention mamba ...] [--lengths 64 128 256 512]

One of two CPU cores, the other busy; jax 0.12.0; width 64, eight paths at a time, each family's defaults, the fastest
of five rounds. A step is for all eight paths. State: numbers after the longest path. T^p: the exponent between the two
longest lengths.

                                forward and backward, ms                a step, us              state
    T =                           128      256      512   ~T^      128      256      512   ~T^      512   ~T^
    attention                    4.17    20.02   107.15   2.4    22.34    33.75    61.31   0.9    66048   1.0
    causal_conv                  0.98     1.24     2.23   0.8     5.77     5.70     5.72   0.0      192   0.0
    causal_mean                  1.38     3.06     8.25   1.4     3.98     3.99     4.00   0.0       64   0.0
    delta_net                   16.92    34.26    86.47   1.3    13.40    13.16    12.80  -0.0     1024   0.0
    fixed_mixing                 2.25     5.39    15.74   1.5    18.07    29.63    53.90   0.9    32768   1.0
    gated_delta_net             23.41    29.97    87.59   1.5    21.63    18.94    18.70  -0.0     1024   0.0
    gated_linear_attention      11.56    18.35    59.30   1.7    11.70    11.48    11.05  -0.1      512   0.0
    gmlp                         7.89    16.26    61.55   1.9    33.22    58.12   120.80   1.1    98304   1.0
    gru                          4.05     7.79    17.24   1.1     8.00     8.16     7.96  -0.0       64   0.0
    hyena                        8.23    16.42    29.66   0.9    74.82   145.75   281.67   1.0    65920   1.0
    identity                     1.19     1.74     2.96   0.8     3.85     3.85     3.76  -0.0        0   0.0
    linear_attention             5.67     9.33    21.70   1.2    11.49    11.18    11.65   0.1     1088   0.0
    linear_mixer                 1.95     4.53    13.67   1.6    17.32    26.98    46.66   0.8    32768   1.0
    lru                          3.90     6.29    11.96   0.9     7.47     7.45     7.58   0.0       64   0.0
    lstm                         4.97    11.62    24.98   1.1     9.74     9.81    10.07   0.0      128   0.0
    mamba                       14.54    42.72    88.26   1.0    52.53    52.62    51.98  -0.0     2432   0.0
    mamba2                      50.90    80.53   172.79   1.1   135.46   137.64   145.34   0.1    17536   0.0
    min_gru                      2.47     4.75     6.67   0.5     5.03     5.36     5.16  -0.1       64   0.0
    retention                    7.33    15.07    31.57   1.1    16.63    16.50    17.03   0.0     2048   0.0
    rwkv4                        2.94     5.08    12.21   1.3     7.47     7.54     7.53  -0.0      256   0.0
    rwkv7                       17.49    29.42    80.38   1.5    16.85    18.67    17.60  -0.1     1088   0.0
    s4d                          4.51     6.06    14.44   1.3    50.83    49.84    53.01   0.1     2048   0.0
    s5                           2.12     3.26     6.91   1.1     5.17     5.41     5.10  -0.1       32   0.0

Attention's passes grow with the square of T and its steps with T; what carries a fixed state has steps of one price,
and passes that grow with T. Between, at these lengths: tables of positions (T^2, in small matrices), and Hyena, whose
Fourier transforms are T log T and whose steps are T.
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
