"""Analyses on CPU: seconds and memory of jaxwalk beside the same computation in PyTorch with `transformers`.

    pip install -e . torch==2.13.0 transformers==5.24.0
    python benchmarks/analysis_cpu.py [score walk gradient decode influence paths] [--rounds 5]

On the shape of GPT-2 small, with the same random weights for both. Two idle CPU cores, jax 0.10.1, PyTorch 2.13.0, the
fastest of five rounds in turns (decode and paths: of three):

    score     PyTorch 0.95 s, jaxwalk 0.74 s: 1.28 times as fast
    walk      PyTorch 0.93 s, without its output head 0.58 s, jaxwalk 0.47 s: 1.97 and 1.23
    gradient  PyTorch 1.87 s, jaxwalk 1.60 s: 1.17
    decode    PyTorch 3.12 s, jaxwalk 1.09 s: 2.87; with XLA's product for output vectors, which copies them, 2.69 s
    paths     beam search 0.41 s, top_paths 0.72 s with the beam's budget, and 2.40 s until all 32 are certified
    influence PyTorch 1149 s, from two of its 32 rows, jaxwalk 243 s: 4.73 (another time 1254 s and 253 s: 4.96)

The results agree to 2e-5, scores of -1400 nats and influences of 370 to 1e-4. The aims were 2, 2, 1.5, twice the beam's
time for paths, and 5: that for paths is reached, those for walks and influence nearly, the others are not: both
libraries make the same matrix products for scores and gradients, and neither library's are always the faster ones. The
law of these random weights is flat: the 32 paths hold 0.037 of the probability, the beam's 0.036. The machine's speed
differed by 1.5 from hour to hour. Influence has one round (ratios of processor times 4.52 and 4.68), before which
jaxwalk compiles for half a minute.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

DEPTH, WIDTH, HEADS, VOCAB, POSITIONS = 12, 768, 12, 50257, 1024
BATCH, LENGTH = 4, 128
INFLUENCE_LENGTH, INFLUENCE_ROWS, DIRECTIONS = 32, 2, 64
PROMPT, STEPS, PATHS = 16, 6, 32
DECODED, DECODED_TOKENS = 8, 32
GAIN = 6.0
CONTENDERS = {
    "score": ("torch", "jaxwalk"),
    "walk": ("torch", "torch without head", "jaxwalk"),
    "gradient": ("torch", "jaxwalk"),
    "decode": ("torch", "jaxwalk, plain product", "jaxwalk"),
    "influence": ("torch", "jaxwalk"),
    "paths": ("beam search", "jaxwalk, beam's budget", "jaxwalk"),
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter that GPT-2 calls `name`: random, and the same for every contender."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if "ln_" in name and name.endswith("weight"):
        return 1 + 0.1 * x
    return x * np.float32(0.03 if x.ndim == 2 else 0.01)


def paths(batch: int, length: int) -> np.ndarray:
    """Random paths."""
    return np.random.default_rng(0).integers(0, VOCAB, (batch, length), np.int32)


def jaxwalk_task(task: str, contender: str) -> Callable[[], Any]:
    """A function that does the task once and returns arrays."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxwalk as jw

    config = jw.ModelConfig(
        vocab_size=VOCAB,
        max_length=POSITIONS,
        width=WIDTH,
        depth=DEPTH,
        aggregate=jw.aggregates.config("attention", heads=HEADS),
        filter=jw.MLPConfig(activation="gelu_tanh"),
        tied=True,
    )
    names = {
        r"embed\.table": "wte.weight",
        r"positions\.table": "wpe.weight",
        r"layers\.blocks\[0\]\.period\[0\]": "h.{}",
        r"aggregate_norm": "ln_1",
        r"filter_norm": "ln_2",
        r"aggregate\.qkv": "attn.c_attn",
        r"aggregate\.out": "attn.c_proj",
        r"filter\.up": "mlp.c_fc",
        r"filter\.down": "mlp.c_proj",
        r"^norm": "ln_f",
        r"scale$": "weight",
    }

    def parameter(path: Any, a: Any) -> Any:
        name = jax.tree_util.keystr(path).lstrip(".")
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        if "{}" not in name:
            return jnp.asarray(draw(name, a.shape))
        stacked = np.empty(a.shape, np.float32)
        for layer, row in enumerate(stacked):
            row[:] = draw(name.format(layer), row.shape)
        return jnp.asarray(stacked)

    shapes = jax.eval_shape(lambda: jw.init(config, jax.random.key(0)))
    model = jax.tree_util.tree_map_with_path(parameter, shapes)

    if task == "score":
        score, tokens = jax.jit(jax.vmap(jw.path_log_prob, (None, 0))), paths(BATCH, LENGTH)
        return lambda: score(model, tokens)
    if task == "walk":
        walk, tokens = jax.jit(jax.vmap(lambda m, t: m.walk(t)[:2], (None, 0))), paths(BATCH, LENGTH)

        def run() -> Any:
            stations, context = walk(model, tokens)
            stations.block_until_ready()
            return context

        return run
    if task == "gradient":
        gradient, tokens = jax.jit(jax.vmap(jw.path_gradient, (None, 0))), paths(BATCH, LENGTH)
        return lambda: gradient(model, tokens)[:, :-1]
    if task == "decode":
        if "plain" in contender:
            jw.filters.times_columns = lambda x, columns: columns @ x

        @jax.jit
        def decode(model: Any, tokens: Any) -> Any:
            def one(path: Any) -> Any:
                state, logits = jw.prefill(model, path[:PROMPT], len(path))

                def take(carry: Any, token: Any) -> Any:
                    state, logits = carry
                    return jw.step(model, state, token), jax.nn.log_softmax(logits)[token]

                return lax.scan(take, (state, logits), path[PROMPT:])[1]

            return jax.vmap(one)(tokens)

        tokens = paths(DECODED, PROMPT + DECODED_TOKENS)
        return lambda: decode(model, tokens)
    if task == "influence":
        tokens = jnp.asarray(paths(1, INFLUENCE_LENGTH)[0])
        influence = jax.jit(jw.context_sensitivity).lower(model, tokens).compile()
        return lambda: influence(model, tokens)

    # The law of random weights is nearly flat: this one's steps are about as uncertain as those of text.
    norm = dataclasses.replace(model.norm, scale=GAIN * model.norm.scale, bias=GAIN * model.norm.bias)
    model = dataclasses.replace(model, norm=norm)
    prompt = paths(1, PROMPT)[0]

    @jax.jit
    def beam(model: Any, prompt: Any) -> Any:
        state, logits = jw.prefill(model, prompt, PROMPT + STEPS - 1)
        states = jax.tree.map(lambda a: jnp.broadcast_to(a, (PATHS, *a.shape)), state)
        log_probs, tokens = lax.top_k(jax.nn.log_softmax(logits), PATHS)
        tokens = tokens[:, None]
        for _ in range(STEPS - 1):
            states, logits = jax.vmap(jw.step, (None, 0, 0))(model, states, tokens[:, -1])
            best, token = lax.top_k(log_probs[:, None] + jax.nn.log_softmax(logits), PATHS)
            log_probs, flat = lax.top_k(best.ravel(), PATHS)
            parents = flat // PATHS
            states = jax.tree.map(lambda a, parents=parents: a[parents], states)
            tokens = jnp.concatenate([tokens[parents], token.ravel()[flat][:, None]], axis=1)
        return log_probs

    budget = None if contender == "jaxwalk" else 1 + (STEPS - 1) * PATHS  # as many prefixes as the beam search expands

    def search() -> Any:
        found = jw.top_paths(model, prompt, STEPS, PATHS, budget=budget)
        return jnp.append(found.log_probs, found.bound)

    return (lambda: beam(model, prompt)) if contender == "beam search" else search


def torch_task(task: str, contender: str) -> Callable[[], Any]:
    """The same in PyTorch, eager, without dropout."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    # Attention written out, where the fused kind cannot be batched over cotangents or is slower when it is.
    kind = "eager" if task == "influence" else "sdpa"
    config = transformers.GPT2Config(attn_implementation=kind)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.transformer.named_parameters():
        parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))

    def score(tokens: Any, **inputs: Any) -> Any:
        log_probs = model(**inputs, use_cache=False).logits.log_softmax(-1)
        return log_probs.gather(2, tokens[:, 1:, None])[..., 0].sum(1)

    tokens = torch.from_numpy(paths(BATCH, LENGTH)).long()
    if task == "score":
        return torch.inference_mode()(lambda: score(tokens, input_ids=tokens[:, :-1]))
    if task == "walk":
        walker = model if contender == "torch" else model.transformer
        walk = lambda: walker(tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
        return torch.inference_mode()(walk)
    if task == "gradient":

        def gradient() -> Any:
            vectors = model.transformer.wte(tokens[:, :-1]).requires_grad_(True)
            return torch.autograd.grad(score(tokens, inputs_embeds=vectors).sum(), vectors)[0]

        return gradient

    if task == "decode":
        tokens = torch.from_numpy(paths(DECODED, PROMPT + DECODED_TOKENS)).long()

        def decode() -> Any:
            done, found = model(tokens[:, :PROMPT], use_cache=True), []
            for token in tokens[:, PROMPT:].T:
                found.append(done.logits[:, -1].log_softmax(-1).gather(1, token[:, None])[:, 0])
                done = model(token[:, None], past_key_values=done.past_key_values, use_cache=True)
            return torch.stack(found, 1)

        return torch.inference_mode()(decode)

    path = torch.from_numpy(paths(1, INFLUENCE_LENGTH)).long()
    contexts = lambda vectors: model.transformer(inputs_embeds=vectors[None], use_cache=False)[0][0]

    def influence() -> Any:
        pull = torch.func.vjp(contexts, model.transformer.wte(path)[0])[1]
        rows = []
        for t in range(INFLUENCE_LENGTH - INFLUENCE_ROWS, INFLUENCE_LENGTH):
            squares = 0.0
            for first in range(0, WIDTH, DIRECTIONS):
                unit = torch.zeros(DIRECTIONS, INFLUENCE_LENGTH, WIDTH)
                unit[torch.arange(DIRECTIONS), t, first + torch.arange(DIRECTIONS)] = 1
                squares = squares + (torch.vmap(pull)(unit)[0] ** 2).sum((0, 2))
            rows.append(squares.sqrt())
        return torch.stack(rows)

    return influence


def work(task: str, contender: str, results: str) -> None:
    """Do the task once for each line that comes in, answer with its wall and CPU seconds; then save what it gave."""
    run = (torch_task if contender.startswith("torch") else jaxwalk_task)(task, contender)
    if task != "influence":  # which is compiled, and takes minutes
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        result = np.asarray(run())
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
    np.save(results, result)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, flush=True)


def compare(task: str, results: dict[str, np.ndarray]) -> str:
    """Whether all contenders computed the same; for paths, what each search found."""
    if task == "paths":
        beam, small, ours = results["beam search"], results["jaxwalk, beam's budget"], results["jaxwalk"]
        found = [f"the beam's {np.exp(beam).sum():.4f}"]
        for searched in (small, ours):
            found.append(f"{np.exp(searched[:-1]).sum():.4f} with {(searched[:-1] >= searched[-1]).sum()} certified")
        return f"probability of the {PATHS} paths: {', '.join(found)}"
    first, *_, ours = results.values()
    ours = ours[-INFLUENCE_ROWS:] if task == "influence" else ours
    return f"largest difference {np.abs(first - ours).max():.1e}, largest value {np.abs(first).max():.1e}"


def main() -> None:
    """Run the tasks that were asked for, contenders in turns, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=5, help="of influence there is one")
    parser.add_argument("--work", nargs=3, metavar=("TASK", "CONTENDER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(*arguments.work)
    print(f"{'task':10}{'contender':24}{'seconds':>9}{'CPU s':>9}{'ratio':>8}{'CPU ratio':>11}{'peak GiB':>10}")
    for task in arguments.tasks:
        with tempfile.TemporaryDirectory() as folder:
            files = {contender: f"{folder}/{contender}.npy" for contender in CONTENDERS[task]}
            workers = {
                contender: subprocess.Popen(
                    [sys.executable, __file__, "--work", task, contender, file],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},  # PyTorch's threads would count as busy
                )
                for contender, file in files.items()
            }
            seconds = {contender: [] for contender in workers}
            for worker in workers.values():
                worker.stdout.readline()
            for _ in range(1 if task == "influence" else arguments.rounds):
                for contender, worker in workers.items():
                    print("go", file=worker.stdin, flush=True)
                    seconds[contender].append(json.loads(worker.stdout.readline()))
            peaks = {contender: float(worker.communicate()[0]) for contender, worker in workers.items()}
            results = {contender: np.load(file) for contender, file in files.items()}
        fastest = {contender: np.min(seen, axis=0) for contender, seen in seconds.items()}
        if task == "influence":  # every row costs PyTorch the same
            fastest["torch"] = fastest["torch"] * INFLUENCE_LENGTH / INFLUENCE_ROWS
        ours = fastest["jaxwalk"]
        for contender, (wall, cpu) in fastest.items():
            line = f"{task:10}{contender:24}{wall:>9.2f}{cpu:>9.2f}{wall / ours[0]:>8.2f}{cpu / ours[1]:>11.2f}"
            print(f"{line}{peaks[contender]:>10.2f}", flush=True)
        print(f"{'':10}{compare(task, results)}", flush=True)


if __name__ == "__main__":
    main()
