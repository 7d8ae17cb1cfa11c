"""Training on CPU: tokens per second of jaxwalk beside the same model in PyTorch, eager and compiled.

    pip install -e . torch==2.13.0
    python benchmarks/train_cpu.py [a b c] [--seconds 10]

All contenders run in one go, in turns on the same machine: (a) L4,H4,D128,T64,B12,V65; (b) L6,H6,D384,T256,B16,V65;
(c) L4,H4,D256,T256,B16,V8192; float32, AdamW, clipping at 1. Printed are ratios to eager PyTorch, and each one's
share of the machine's matrix-product peak, measured in the same run. The PyTorch model is nanoGPT's architecture
(pre-norm, exact GELU, learned positions, tied output vectors, fused attention) in torch.nn.

Seen on 2 cores (jax 0.10.1, torch 2.13.0, November 2026), tokens/s and the ratio to eager PyTorch:

    shape   torch eager   jaxwalk        plain product   torch compiled
    a            27,218   24,459  0.90   18,511  0.68    28,601  1.05
    b             3,514    2,869  0.82    2,020  0.57     3,306  0.94
    c             5,902    5,653  0.96    4,389  0.74     6,313  1.07

"plain product" is jaxwalk without jaxwalk/_products.py. What is left to eager PyTorch is XLA's matrix product: on the
shapes of b, without any model around it, it reaches 250 to 310 GFLOP/s where PyTorch's reaches 320 to 360.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

SHAPES = {
    "a": {"depth": 4, "heads": 4, "width": 128, "length": 64, "batch": 12, "vocab": 65, "steps_per_call": 20},
    "b": {"depth": 6, "heads": 6, "width": 384, "length": 256, "batch": 16, "vocab": 65, "steps_per_call": 10},
    "c": {"depth": 4, "heads": 4, "width": 256, "length": 256, "batch": 16, "vocab": 8192, "steps_per_call": 10},
}


def jaxwalk_steps(s: dict, plain: bool = False) -> tuple[Callable[[], None], int]:
    """A function that runs one jitted call on fresh host batches, and how many steps it is.

    With `plain`, x @ W is JAX's own product, batched by vmap, instead of that of jaxwalk/_products.py.
    """
    import jax

    import jaxwalk as jw
    from jaxwalk import filters, training
    from jaxwalk.config import MeshConfig, MLPConfig, OptimConfig, TrainConfig, WorldData

    config = TrainConfig(
        name="bench",
        data=WorldData("mess3"),
        model=jw.ModelConfig(
            vocab_size=s["vocab"],
            max_length=s["length"],
            width=s["width"],
            depth=s["depth"],
            aggregate=jw.aggregates.config("attention", heads=s["heads"]),
            filter=MLPConfig(activation="gelu"),
            tied=True,
        ),
        optim=OptimConfig(schedule="constant", warmup=0),
        mesh=MeshConfig(1, 1),
        batch_size=s["batch"],
        steps_per_call=s["steps_per_call"],
        log_every=100,
        eval_every=500,
    )
    rng = np.random.default_rng(0)

    class Batches:
        def inputs(self, step, count):
            return rng.integers(0, s["vocab"], (count, s["batch"], s["length"] + 1), np.int32)

        def batch(self, tokens):
            return tokens, None

    mesh = training.make_mesh(config.mesh)
    update = training.optimizer(config.optim, config.steps)
    state = training.make_state(config, update, mesh)
    call = training.make_call(config, Batches(), update, mesh, state)  # type: ignore[arg-type]
    held = [jax.tree.leaves(state)]
    del state
    batches = Batches()

    def run() -> None:
        held[0], metrics = call(held[0], batches.inputs(0, s["steps_per_call"]))
        jax.block_until_ready(metrics)

    if plain:
        ours, filters.times = filters.times, lambda x, w: x @ w
        run()  # compiles with it
        filters.times = ours

    return run, s["steps_per_call"]


def torch_steps(s: dict, compiled: bool) -> tuple[Callable[[], None], int]:
    """One training step of nanoGPT's architecture in torch.nn."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            D = s["width"]
            self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x):
            B, T, D = x.shape
            q, k, v = (part.view(B, T, s["heads"], -1).transpose(1, 2) for part in self.qkv(self.n1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.n2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(s["vocab"], s["width"]), nn.Embedding(s["length"], s["width"])
            self.blocks = nn.ModuleList(Block() for _ in range(s["depth"]))
            self.norm = nn.LayerNorm(s["width"])
            for table in (self.tokens, self.places):
                nn.init.normal_(table.weight, std=0.02)

        def forward(self, x, y):
            h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
            for block in self.blocks:
                h = block(h)
            logits = self.norm(h) @ self.tokens.weight.T
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))

    torch.manual_seed(0)
    model = GPT()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    forward = torch.compile(model) if compiled else model
    rng = np.random.default_rng(0)

    def run() -> None:
        tokens = torch.from_numpy(rng.integers(0, s["vocab"], (s["batch"], s["length"] + 1)))
        loss = forward(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run, 1


def peak() -> float:
    """Floating-point operations per second of a large float32 matrix product (numpy's or torch's, the faster)."""
    import torch

    best = 0.0
    a = torch.randn(1536, 1536)
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * 1536**3 / (time.perf_counter() - start))
    return best


def flops_per_token(s: dict) -> float:
    """6 x weights that multiply, and attention's 12 x depth x width x mean context length."""
    weights = 12 * s["depth"] * s["width"] ** 2 + s["vocab"] * s["width"]
    return 6 * weights + 12 * s["depth"] * s["width"] * s["length"] / 2


def main() -> None:
    """Run the shapes that were asked for, contenders in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help="of a, b, c")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each contender and shape")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave compiled PyTorch out (it needs a C++ compiler)"
    )
    arguments = parser.parse_args()
    top = peak()
    print(f"matrix-product peak {top / 1e9:.0f} GFLOP/s")
    print(f"{'shape':6}{'contender':18}{'tokens/s':>10}{'x eager':>9}{'of peak':>9}")
    for name in arguments.shapes:
        s = SHAPES[name]
        contenders = {"torch eager": torch_steps(s, False), "jaxwalk": jaxwalk_steps(s)}
        contenders["plain product"] = jaxwalk_steps(s, plain=True)
        if not arguments.no_compile:
            contenders["torch compiled"] = torch_steps(s, True)
        for run, _ in contenders.values():
            run()
            run()
        rates: dict[str, list[float]] = {c: [] for c in contenders}
        rounds = 5
        for _ in range(rounds):
            for contender, (run, steps) in contenders.items():
                count, start = 0, time.perf_counter()
                while time.perf_counter() - start < arguments.seconds / rounds:
                    run()
                    count += steps
                rates[contender].append(count * s["batch"] * s["length"] / (time.perf_counter() - start))
        eager = np.median(rates["torch eager"])
        for contender, seen in rates.items():
            rate = float(np.median(seen))
            share = rate * flops_per_token(s) / top
            print(f"{name:6}{contender:18}{rate:>10,.0f}{rate / eager:>9.2f}{share:>9.0%}", flush=True)


if __name__ == "__main__":
    main()
