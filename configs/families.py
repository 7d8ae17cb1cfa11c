"""Every family of aggregates on the same data, at equal parameters, from several seeds and learning rates.

    python configs/families.py                            # all of them on all data: hours; it goes on where it stopped
    python configs/families.py --on mess3 --families attention mamba gru
    python train.py configs/families.py --model.aggregate mamba        # one of them, as a run to analyse

The seeds and rates of one family are trained side by side as one program (`jaxwalk.sweep`). The hidden width of the
MLPs makes the parameters equal; the data, its order and the number of steps are the same for all. The learning rate is
chosen per family on held-out paths, from a grid that is extended until the best is not at its edge. The loss is that of
other paths, on a world the exact excess KL(world || model), with a 95% interval over seeds and paths, both resampled.
What is measured is kept in runs/families/, and the tables in configs/families.md are written from it.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxwalk import ModelConfig, TrainConfig, WorldData, aggregates
from jaxwalk.config import MLPConfig, OptimConfig, TextData

DATA = {
    "mess3": (WorldData("mess3"), {"vocab_size": 3, "max_length": 16}, {"steps": 300, "batch_size": 32}),
    "associative_recall": (
        WorldData("associative_recall", {"keys": 4, "values": 4}),
        {"vocab_size": 8, "max_length": 16},
        {"steps": 1500, "batch_size": 64},
    ),
    "pydoc": (TextData("pydoc"), {"vocab_size": 257, "max_length": 32}, {"steps": 300, "batch_size": 32}),
}
WIDTH, DEPTH, HIDDEN = 32, 2, 192  # of attention's MLPs, whose number of parameters all others are given
RATES = (3e-3, 6e-3)
BOUNDS = (3e-4, 0.1)
"""The grid of learning rates is extended, by factors of 2 within these bounds, until the best is not at its edge."""
PATHS = 512
CHOICES: dict[str, dict[str, Any]] = {"attention": {"positions": "rope"}, "hyena": {"filter_width": 16}}
"""Beyond each family's defaults. At its default the network that makes Hyena's filters is larger than all the rest."""


def get_config(name: str = "associative_recall") -> TrainConfig:
    """What all families share on one data set, with attention."""
    data, shape, training = DATA[name]
    return TrainConfig(
        name="families",
        data=data,
        model=ModelConfig(
            **shape,
            width=WIDTH,
            depth=DEPTH,
            aggregate=aggregates.config("attention", **CHOICES["attention"]),
            filter=MLPConfig(hidden=HIDDEN),
        ),
        optim=OptimConfig(lr=RATES[-1], warmup=50, weight_decay=0.01, final_lr=0.01),
        eval_every=100,
        **training,
    )


def config_of(name: str, family: str) -> TrainConfig:
    """The config of one family, with as many parameters as attention has."""
    from jaxwalk import sweep

    config = get_config(name)
    model = dataclasses.replace(config.model, aggregate=aggregates.config(family, **CHOICES.get(family, {})))
    return dataclasses.replace(config, model=sweep.match_parameters(model, sweep.count_parameters(config.model)))


def path_losses(swept: Any, rows: Any, world: Any) -> Any:
    """The loss of each path under each member, [M, n]; of a world the exact excess, KL(world || model)."""
    import numpy as np

    from jaxwalk import sweep
    from jaxwalk.evidence.finding import NotApplicable
    from jaxwalk.evidence.laws import observe

    if world is None:
        return sweep.held_out_losses(swept.models, rows)

    def excess(number: int) -> Any:
        try:
            return observe(swept.member(number), world, rows).kl.mean(axis=1)
        except NotApplicable:  # it has diverged
            return np.full(len(rows), np.nan)

    return np.stack([excess(number) for number in range(len(swept.seeds))])


def measure(name: str, family: str, seeds: int, steps: int | None) -> dict[str, Any]:
    """Train one family on one data set; what the table says of it."""
    import jax
    import numpy as np

    import jaxwalk as jw
    from jaxwalk.evidence.statistics import crossed_means, percentiles

    config = config_of(name, family)
    config = dataclasses.replace(config, steps=steps or config.steps)
    data = jw.sweep.held_out(config, PATHS)
    choosing: dict[float, float] = {}
    scored: dict[float, np.ndarray] = {}
    untried: tuple[float, ...] = RATES
    while untried:
        swept = jw.sweep.train(config, range(seeds), untried)
        by_rate = [path_losses(swept, rows, data.world).reshape(seeds, len(untried), -1) for rows in data[:2]]
        for i, rate in enumerate(untried):
            mean = float(by_rate[0][:, i].mean())
            choosing[rate] = mean if np.isfinite(mean) else np.inf
            scored[rate] = by_rate[1][:, i]
        best = min(choosing, key=choosing.__getitem__)
        beyond = {min(choosing): best / 2, max(choosing): best * 2}.get(best)
        untried = () if beyond is None or not BOUNDS[0] <= beyond <= BOUNDS[1] else (beyond,)
    losses = scored[best]
    if data.world is None:
        counts = np.bincount(data.choosing.ravel(), minlength=config.model.vocab_size) + 1.0
        reference, against = float(-np.log(counts / counts.sum())[data.own[:, 1:]].mean()), "unigram"
        losses = losses / np.log(2)
        reference /= np.log(2)
    else:
        law = jax.jit(jax.vmap(data.world.next_log_probs))(data.own[:, :-1])[:, 1:]
        reference, against = float(jax.scipy.special.entr(np.exp(law)).sum(-1).mean()), "ideal observer"
    low, high = percentiles(crossed_means(losses))
    model = jax.eval_shape(lambda: jw.init(config.model, jax.random.key(0)))
    kinds = {type(layer.aggregate).kind for layer in model.layers}
    return {
        "family": family,
        "kind": kinds.pop(),
        "parameters": jw.sweep.count_parameters(config.model),
        "hidden": config.model.filter.hidden,
        "state": model.state_size(config.model.max_length),
        "rate": best,
        "rates": sorted(choosing),
        "mean": float(losses.mean()),
        "interval": [float(low), float(high)],
        "by_seed": losses.mean(1).tolist(),
        "reference": reference,
        "against": against,
        "seeds": seeds,
        "steps": config.steps,
    }


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """One data set's rows as a table in Markdown, the best first."""
    first, config = rows[0], get_config(name)
    if first["against"] == "unigram":
        what, reference = "bits per byte", f"token frequencies alone: {first['reference']:.3f} bits per byte"
    else:
        what = "exact excess, nats per token"
        reference = f"excess is over the ideal observer's {first['reference']:.4f} nats per token"
    lines = [
        f"## {name}",
        "",
        f"{first['seeds']} seeds, {first['steps']} steps of {config.batch_size} paths of {config.model.max_length + 1} "
        f"tokens, the best learning rate of {', '.join(f'{rate:g}' for rate in RATES)} and, while the best is "
        f"at the edge, of half or twice as much; {reference}.",
        "",
        f"| family | {what} | 95% interval | seeds | rate | state | parameters | MLP | A |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["mean"]):
        low, high = row["interval"]
        by_seed = ", ".join(f"{value:.3g}" for value in row["by_seed"])
        lines.append(
            f"| {row['family']} | {row['mean']:.4f} | [{low:.4f}, {high:.4f}] | {by_seed} | {row['rate']:g} | "
            f"{row['state']:,} | {row['parameters']:,} | {row['hidden']} | {row['kind']} |"
        )
    return "\n".join(lines)


def document(folder: Path) -> str:
    """configs/families.md, from all that has been measured."""
    parts = [
        "# Families side by side",
        "",
        f"Made by `python configs/families.py`: {DEPTH} layers of width {WIDTH}, each family with its defaults (but "
        "attention with RoPE, and Hyena's filters made by a network of width 16) and with as many parameters as "
        "attention with MLPs of "
        f"{HIDDEN}. State: how many numbers decoding carries at the longest path. A: whether the mixing matrix is all "
        "that passes between positions (exact), or the values read the past too (conditional). One "
        "width and brief training are what these numbers are about: an order among families they are not.",
    ]
    for name in DATA:
        rows = [json.loads(file.read_text()) for file in sorted((folder / name).glob("*.json"))]
        if rows:
            parts += ["", table(name, rows)]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", nargs="+", choices=tuple(DATA), default=tuple(DATA), help="data sets")
    parser.add_argument("--families", nargs="+", choices=aggregates.names(), default=aggregates.names())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="a multiple of 10; by default each data set's own")
    parser.add_argument("--out", type=Path, default=Path("runs/families"), help="where measured numbers are kept")
    parser.add_argument("--again", action="store_true", help="measure what has been measured before too")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".md"), help="the document to write")
    chosen = parser.parse_args(arguments)
    for name in chosen.on:
        for family in chosen.families:
            file = chosen.out / name / f"{family}.json"
            if file.is_file() and not chosen.again:
                continue
            print(f"{name}: {family}", flush=True)
            row = measure(name, family, chosen.seeds, chosen.steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row, indent=2) + "\n")
            print(f"  {row['mean']:.4f} [{row['interval'][0]:.4f}, {row['interval'][1]:.4f}]", flush=True)
            chosen.record.write_text(document(chosen.out), encoding="utf-8")
    print(f"written: {chosen.record}")
    return 0


if __name__ == "__main__":
    # The folder of this file has a pydoc.py, which scipy would take for that of Python.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
