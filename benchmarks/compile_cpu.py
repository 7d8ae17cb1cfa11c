"""Compilation on CPU: programs and CPU-seconds of every public function, of this checkout beside another one.

    pip install -e .
    git worktree add ../other COMMIT
    python benchmarks/compile_cpu.py [--beside ../other] [--only decompose,sample_paths]

For each function, called eagerly as a user would: the programs that XLA compiles, and the CPU-seconds, of the first
call, of the same call again, and of a call with a path that is one token longer. Each checkout runs in its own
process. Then how long warm calls take, and the time to compile a walk of 2 and of 30 layers. `mixing_effects` alone
compiles for the next length: it hands its function the matrices of the true length. On two cores, jax 0.12.0.1:

                                      version 0.2            commit 1632d0b
    programs of the first calls           41                     712
    programs of the same calls             0                       8
    programs of the next length            1                     520
    CPU-seconds: first, again, next   109, 1.2, 2.7          105, 18.1, 95.7
    warm next_log_probs, ms                1.2                    89
    compile 2 and 30 layers, s         1.47, 1.89             0.85, 2.17
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 20  # and 21: both are padded to 24


def functions(jw: Any, model: Any, jax: Any, jnp: Any) -> dict[str, Callable[[int], Any]]:
    """Every public function of paths, by name, as a function of the length of its path."""
    key = jax.random.key(0)
    rng = np.random.default_rng(0)
    path = lambda T: np.random.default_rng(T).integers(0, model.vocab_size, T).astype(np.int32)
    S, D = 2 * model.depth + 1, model.width
    state, context = {}, jnp.asarray(rng.normal(size=D), jnp.float32)
    stations = jnp.asarray(rng.normal(size=(S, 64, D)), jnp.float32)
    noise = lambda *shape: rng.normal(size=shape).astype(np.float32)
    walk = noise(S, D)

    def stepped(T: int) -> Any:
        if T not in state:
            state[T] = jw.init_state(model, T)
        state[T], logits = jw.step(model, state[T], 1)
        return logits

    last_half = lambda A: A  # one object, so that its program can be reused
    visit = jw.visits(1)
    return {
        "init": lambda T: jw.init(CONFIG(jw), jax.random.key(T)),
        "astype": lambda T: jw.astype(model, jnp.bfloat16),
        "next_log_probs": lambda T: jw.next_log_probs(model, path(T)),
        "path_log_prob": lambda T: jw.path_log_prob(model, path(T)),
        "path_log_prob, nudged": lambda T: jw.path_log_prob(model, path(T), nudge=noise(S, T, D)),
        "encoding_walk": lambda T: jw.encoding_walk(model, path(T)),
        "encoding_walk, with a mixing matrix": lambda T: jw.encoding_walk(model, path(T), record_mixing=(T % 2,)),
        "context_vector": lambda T: jw.context_vector(model, path(T)),
        "init_state": lambda T: jw.init_state(model, T),
        "prefill": lambda T: jw.prefill(model, path(T), 40),
        "step": stepped,
        "sample_paths": lambda T: jw.sample_paths(model, path(T), key, 3, 4),
        "top_paths": lambda T: jw.top_paths(model, path(T), 3, 4),
        "path_entropy": lambda T: jw.path_entropy(model, path(T), 2),
        "path_entropy, sampled": lambda T: jw.path_entropy(model, path(T), 11, key=key, samples=64),
        "event_probability": lambda T: jw.event_probability(model, path(T), 2, visit),
        "path_gradient": lambda T: jw.path_gradient(model, path(T)),
        "station_gradient": lambda T: jw.station_gradient(model, path(T)),
        "context_sensitivity": lambda T: jw.context_sensitivity(model, path(T)),
        "context_jvp": lambda T: jw.context_jvp(model, path(T), noise(T, D)),
        "context_vjp": lambda T: jw.context_vjp(model, path(T), noise(T, D)),
        "context_spectrum": lambda T: jw.context_spectrum(model, path(T), 2),
        "decompose": lambda T: jw.decompose(model, path(T)),
        "decompose_steps": lambda T: jw.decompose_steps(model, path(T)),
        "decompose_steps_by_token": lambda T: jw.decompose_steps_by_token(model, path(T)),
        "decompose_heads": lambda T: jw.decompose_heads(model, path(T), T % 2),
        "decompose_neurons": lambda T: jw.decompose_neurons(model, path(T), T % 2),
        "logit_readout": lambda T: jw.logit_readout(model, T % 5),
        "log_prob_readout": lambda T: jw.log_prob_readout(model, context, T % 5),
        "held_attribution": lambda T: jw.held_attribution(model, path(T), 1),
        "gradient_attribution": lambda T: jw.gradient_attribution(model, path(T), 1),
        "integrated_gradients": lambda T: jw.integrated_gradients(model, path(T), 1),
        "occlusion": lambda T: jw.occlusion(model, path(T), 1),
        "patch_effects": lambda T: jw.patch_effects(model, path(T), noise(S, T, D)),
        "nudge_effects": lambda T: jw.nudge_effects(model, path(T), noise(S, T, D)),
        "mixing_effects": lambda T: jw.mixing_effects(model, path(T), last_half),
        "jacobian_lens": lambda T: jw.jacobian_lens(model, np.stack([path(20)] * 4), np.arange(4)),
        "least_squares_lens": lambda T: jw.least_squares_lens(stations),
        "tuned_lens": lambda T: jw.tuned_lens(model, stations, key=key, steps=5, batch=8),
        "lens_log_probs": lambda T: jw.lens_log_probs(model, jw.LOGIT_LENS, stations),
        "fisher_lengths": lambda T: jw.fisher_lengths(model, walk),
        "step_divergences": lambda T: jw.step_divergences(model, walk),
    }


def CONFIG(jw: Any, depth: int = 4) -> Any:
    """The model that is measured."""
    return jw.ModelConfig(vocab_size=5, max_length=64, width=64, depth=depth)


def measure(only: list[str]) -> dict[str, Any]:
    """The numbers of the checkout on the path, in this process."""
    import jax
    import jax.monitoring
    import jax.numpy as jnp

    import jaxwalk as jw

    compiled = [0]

    def count(event: str, *_: Any, **__: Any) -> None:
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    model = jw.init(CONFIG(jw), jax.random.key(0))
    results: dict[str, Any] = {}
    for name, function in functions(jw, model, jax, jnp).items():
        if only and name not in only:
            continue
        row = []
        for T in (LENGTH, LENGTH, LENGTH + 1):
            before, start = compiled[0], time.process_time()
            jax.block_until_ready(function(T))
            row += [compiled[0] - before, time.process_time() - start]
        results[name] = row
    path = np.random.default_rng(0).integers(0, 5, LENGTH).astype(np.int32)
    warm = {"next_log_probs": jw.next_log_probs, "path_log_prob": jw.path_log_prob, "encoding_walk": jw.encoding_walk}
    results["warm, ms"] = {name: warm_ms(lambda f=f: f(model, path), jax) for name, f in warm.items()}
    seconds = {}
    for depth in (2, 30):
        deep = jax.eval_shape(lambda depth=depth: jw.init(CONFIG(jw, depth), jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
        walk = jax.jit(lambda m, t: m.walk(t).stations)
        start = time.process_time()
        walk.lower(deep, tokens).compile()
        seconds[depth] = time.process_time() - start
    results["compile a walk of 2 and of 30 layers, s"] = seconds
    return results


def warm_ms(call: Callable[[], Any], jax: Any, rounds: int = 30) -> float:
    """The fastest of many calls, in milliseconds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def run(checkout: Path, only: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own, with the checkout first on the path and no compilation cache."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"PYTHONPATH": str(checkout), "JAXWALK_COMPILATION_CACHE": "off"}
    command = [sys.executable, __file__, "--measure", "--only", ",".join(only)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout to measure in the same run")
    parser.add_argument("--only", default="", help="these functions only")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    only = [name.strip() for name in chosen.only.split(",") if name.strip()]
    if chosen.measure:
        print(json.dumps(measure(only)))
        return
    here = Path(__file__).resolve().parent.parent
    checkouts = {"here": here} | ({"beside": chosen.beside.resolve()} if chosen.beside else {})
    results = {name: run(path, only) for name, path in checkouts.items()}
    columns = ("first call", "again", "next length")
    print("programs and CPU-seconds of")
    for name in results:
        print(f"{'':38}" * (name == "here") + "".join(f"{name + ', ' + column:>22}" for column in columns), end="")
    print()
    for function, row in results["here"].items():
        if isinstance(row, list):
            cells = [result.get(function, [0] * 6) for result in results.values()]
            print(f"{function:38}" + "".join(f"{c[i]:13d} {c[i + 1]:8.2f}" for c in cells for i in (0, 2, 4)))
    for name, result in results.items():
        rows = [row for row in result.values() if isinstance(row, list)]
        totals = [sum(row[i] for row in rows) for i in range(6)]
        print(f"{name + ', in all':38}" + "".join(f"{totals[i]:13d} {totals[i + 1]:8.2f}" for i in (0, 2, 4)))
    for name, result in results.items():
        for what in ("warm, ms", "compile a walk of 2 and of 30 layers, s"):
            print(f"{name}: {what}: " + ", ".join(f"{k} {v:.2f}" for k, v in result[what].items()))


if __name__ == "__main__":
    main()
