"""Is association needed? Models with and without it, trained from scratch at equal parameters, data and compute.

    python examples/association_ladder.py mess3
    python examples/association_ladder.py all --seeds 3

Four models that differ in how they mix positions are trained side by side on one world, or on English, from several
seeds at once: attention, whose A depends on the tokens; a learned A that is the same for all paths; the causal mean;
and A = I, which sees the current token only. On held-out paths,

    association bias = (loss of the best fixed A - loss of attention) / (loss of A = I - loss of attention)

is the share of what mixing is worth that takes association; 1 minus it is the share that a fixed A can win. This is
the comparison that `jaxwalk/analyses/association.py`, the same ladder inside one trained model, cannot make: a model
that was trained with its own patterns may lean on them where others would have served. That ladder of the attention
model is printed beside it. Written to runs/examples/association_ladder/NAME: findings.json, arrays, a page.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxwalk as jw
from jaxwalk.analyses import Figure, Finding, Series, Subject
from jaxwalk.config import MLPConfig, OptimConfig, TextData, TrainConfig, WorldData
from jaxwalk.evidence.laws import observe
from jaxwalk.evidence.statistics import crossed_means

CLAIM = "C6: attention adds an association bias to the composition of context vectors, which may be redundant."
RUNGS = {
    "attention": jw.aggregates.config("attention", heads=4, positions="rope"),
    "fixed_mixing": jw.aggregates.config("fixed_mixing", heads=4),
    "causal_mean": jw.aggregates.config("causal_mean"),
    "identity": jw.aggregates.config("identity"),
}
FIXED = ("fixed_mixing", "causal_mean")


def config_of(name: str) -> TrainConfig:
    """What all models of one data set share; the width of the MLPs is attention's, and fits the others to it."""
    data, shape, lr, training = {
        "mess3": (
            WorldData("mess3"),
            {"vocab_size": 3, "max_length": 16, "width": 32, "depth": 2},
            3e-3,
            {"steps": 400},
        ),
        "rrxor": (
            WorldData("rrxor"),
            {"vocab_size": 2, "max_length": 16, "width": 32, "depth": 3},
            3e-3,
            {"steps": 800},
        ),
        "associative_recall": (
            WorldData("associative_recall", {"keys": 4, "values": 4}),
            {"vocab_size": 8, "max_length": 24, "width": 32, "depth": 2},
            5e-3,
            {"steps": 1500},
        ),
        "pydoc": (
            TextData("pydoc"),
            {"vocab_size": 257, "max_length": 64, "width": 64, "depth": 2},
            3e-3,
            {"steps": 800, "batch_size": 16},
        ),
    }[name]
    return TrainConfig(
        name=name,
        data=data,
        model=jw.ModelConfig(**shape, filter=MLPConfig(hidden=4 * shape["width"])),
        optim=OptimConfig(lr=lr, warmup=50, weight_decay=0.01, final_lr=0.01),
        eval_every=100,
        **training,
    )


NAMES = ("mess3", "rrxor", "associative_recall", "pydoc")


def rungs_of(config: TrainConfig) -> dict[str, TrainConfig]:
    """The config of each rung: attention with the filters it is given, the others with as many parameters as it has."""
    models = {name: dataclasses.replace(config.model, aggregate=aggregate) for name, aggregate in RUNGS.items()}
    target = jw.sweep.count_parameters(models["attention"])
    return {
        name: dataclasses.replace(
            config, model=model if name == "attention" else jw.sweep.match_parameters(model, target)
        )
        for name, model in models.items()
    }


def finding_of(
    losses: Mapping[str, np.ndarray],
    choosing: Mapping[str, np.ndarray],
    references: Mapping[str, float],
    conventions: Mapping[str, Any],
    curves: Mapping[str, np.ndarray] | None = None,
) -> Finding:
    """The finding `association_from_scratch`.

    losses: of each rung, the loss of each path under the model of each seed, [S, n], nats per token. choosing: the same
    of the rungs of FIXED on other paths. references: losses on the same paths that no rung has: unigram, uniform and,
    where the law is known, ideal_observer. curves: "steps" [E], and of each rung [E, S], losses along training.
    """
    S, n = losses["attention"].shape
    best = min(FIXED, key=lambda name: choosing[name].mean())
    draws = {name: crossed_means(loss) for name, loss in losses.items()}
    ends = lambda values: tuple(float(end) for end in np.quantile(values, [0.025, 0.975]))

    means = {name: float(loss.mean()) for name, loss in losses.items()}
    costs = {name: means[name] - means["attention"] for name in RUNGS if name != "attention"}
    cost_draws = {name: draws[name] - draws["attention"] for name in costs}
    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    low, high = ends(cost_draws["identity"])
    defined = low > 0 or high < 0
    if defined:
        measured["association_bias"] = costs[best] / costs["identity"]
        interval["association_bias"] = ends(cost_draws[best] / cost_draws["identity"])
        measured["fixed_share"] = 1 - measured["association_bias"]
        interval["fixed_share"] = (1 - interval["association_bias"][1], 1 - interval["association_bias"][0])
        null |= {"association_bias.fixed_as_good_as_attention": 0.0, "association_bias.fixed_as_bad_as_none": 1.0}
    for name, cost in costs.items():
        measured[f"cost_{name}"], interval[f"cost_{name}"] = cost, ends(cost_draws[name])
        null[f"cost_{name}.unigram"] = references["unigram"] - means["attention"]
    for name, mean in means.items():
        measured[f"loss_{name}"], interval[f"loss_{name}"] = mean, ends(draws[name])
        null |= {f"loss_{name}.{reference}": value for reference, value in references.items()}

    labels = ["attention", "fixed A, learned", "causal mean", "none (A = I)"]
    bounds = np.array([interval[f"loss_{name}"] for name in RUNGS])
    arrays = {
        "rung": np.array(labels),
        "loss": np.array([means[name] for name in RUNGS]),
        "loss_low": bounds[:, 0],
        "loss_high": bounds[:, 1],
        "loss_by_seed": np.stack([losses[name].mean(1) for name in RUNGS]),
        "loss_by_path": np.stack([losses[name] for name in RUNGS]),
    }
    figures = [
        Figure(
            "ladder_from_scratch",
            "Held-out loss of models trained from scratch, by how they mix positions",
            "mixing matrix",
            "nats per token",
            (Series("mean over seeds and paths", "loss", "rung", style="bars", low="loss_low", high="loss_high"),),
            references={name.replace("_", " "): value for name, value in references.items() if name != "uniform"},
        )
    ]
    if curves is not None:
        arrays["step"] = curves["steps"]
        for name in RUNGS:
            arrays[f"curve_{name}"] = curves[name].mean(1)
            arrays[f"curve_{name}_low"], arrays[f"curve_{name}_high"] = curves[name].min(1), curves[name].max(1)
        figures.append(
            Figure(
                "learning_from_scratch",
                "Held-out loss along training: mean of the seeds, and the range of them",
                "step",
                "nats per token",
                tuple(
                    Series(label, f"curve_{name}", "step", low=f"curve_{name}_low", high=f"curve_{name}_high")
                    for name, label in zip(RUNGS, labels, strict=True)
                ),
            )
        )
    if defined:
        said = (
            f"Trained from scratch, the association bias is {measured['association_bias']:.3f} "
            f"[{interval['association_bias'][0]:.3f}, {interval['association_bias'][1]:.3f}]: of the "
            f"{costs['identity']:.3f} nat per token that mixing is worth, the best fixed A ({best}) wins "
            f"{measured['fixed_share']:.1%}"
        )
    else:
        said = (
            f"The association bias is undefined, as training without any mixing costs {costs['identity']:.3f} "
            f"[{low:.3f}, {high:.3f}] nat per token, perhaps nothing"
        )
    beside = f", the ideal observer {references['ideal_observer']:.3f}" if "ideal_observer" in references else ""
    return Finding(
        name="association_from_scratch",
        claim=CLAIM,
        measured=measured,
        interval=interval,
        null=null,
        conventions={
            "association_bias": f"cost_{best} / cost_identity"
            if defined
            else f"undefined: the interval of cost_identity, [{low:.3g}, {high:.3g}], reaches 0",
            "cost": "loss of the rung minus loss of attention, same paths, mean over seeds",
            "loss": "-log p of each token after the first, mean over tokens, then paths, then seeds",
            "units": "nats per token; the bias and the share are ratios, never clipped",
            "fixed_A": f"{best}, which has the lower loss of {', '.join(FIXED)} on {choosing[best].shape[1]} other "
            "held-out paths",
            "identity": "A = I, which still sees the current token and its position",
            "intervals": "95%, bootstrap over paths and seeds, crossed: both are resampled, alike for all rungs; "
            + (
                "of one seed, it is an interval over paths alone"
                if S == 1
                else f"{S} seeds are few, and what the interval knows of how seeds vary is how these do"
            ),
            "seeds": f"{S}, each with its own initialisation and training data; a seed's data is the same on all rungs",
            "paths": f"{n}, the same for all rungs and seeds",
            **conventions,
        },
        arrays=arrays,
        figures=tuple(figures),
        verdict=(
            f"{said}. Losses: attention {means['attention']:.3f}, learned fixed A {means['fixed_mixing']:.3f}, causal "
            f"mean {means['causal_mean']:.3f}, none {means['identity']:.3f}; token frequencies "
            f"{references['unigram']:.3f}{beside}."
        ),
    )


def path_losses(swept: jw.sweep.Sweep, rows: np.ndarray, world: Any) -> np.ndarray:
    """The loss of each path under each member, [M, n]; on a world, in expectation over each next token."""
    if world is None:
        return jw.sweep.held_out_losses(swept.models, rows)
    steps = (observe(swept.member(number), world, rows) for number in range(len(swept.seeds)))
    return np.stack([(each.kl + each.world_entropy).mean(axis=1) for each in steps])


def ladder(config: TrainConfig, seeds: int, paths: int) -> list[Finding]:
    """Train all rungs on one data set. The finding, and the ladder inside the attention model of the first seed."""
    data = jw.sweep.held_out(config, paths)
    losses, choosing, curves, facts, attention = {}, {}, {}, {}, None
    for name, rung in rungs_of(config).items():
        print(f"{config.name}: {name}, {seeds} seeds", flush=True)
        swept = jw.sweep.train(rung, range(seeds), report=lambda line: print(f"  {line}", flush=True))
        losses[name] = path_losses(swept, data.own, data.world)
        if name in FIXED:
            choosing[name] = path_losses(swept, data.choosing, data.world)
        curves |= {"steps": swept.steps, name: swept.losses}
        facts[name] = {
            "parameters": jw.sweep.count_parameters(rung.model),
            "hidden": rung.model.filter.hidden,
            "flops": jw.sweep.flops(rung.model),
        }
        attention = swept if name == "attention" else attention

    counts = np.bincount(data.choosing.ravel(), minlength=config.model.vocab_size) + 1.0
    references = {
        "unigram": float(-np.log(counts / counts.sum())[data.own[:, 1:]].mean()),
        "uniform": float(np.log(config.model.vocab_size)),
    }
    if data.world is not None:
        world = data.world
        law = jax.jit(jax.vmap(world.next_log_probs))(data.own[:, :-1])[:, 1:]
        references = {"ideal_observer": float(jax.scipy.special.entr(np.exp(law)).sum(-1).mean()), **references}
    of = lambda what: {name: fact[what] for name, fact in facts.items()}
    listed = lambda values: ", ".join(f"{name} {value:,.0f}" for name, value in values.items())
    apart = lambda values: max(abs(value / values["attention"] - 1) for value in values.values())
    conventions = {
        "parameters": f"{listed(of('parameters'))}: equal within {apart(of('parameters')):.2%}",
        "hidden": f"{listed(of('hidden'))}: the width of the MLPs, which makes the parameters equal",
        "flops": f"{listed(of('flops'))} for a path, counted by XLA: equal within {apart(of('flops')):.0%}",
        "training": f"{config.steps} steps of {config.batch_size} paths of {config.model.max_length + 1} tokens, "
        f"the same paths in the same order on all rungs; one learning rate, {config.optim.lr:g}, for all",
        "positions": "learned position vectors on all rungs; attention has RoPE as well",
        "unigram": f"law of the tokens of the other paths, with 1 added to each count; {data.choosing.size} tokens",
    }
    if data.world is not None:
        conventions["loss"] = (
            "exact, in expectation over the next token: the world's entropy plus KL(world || model) after each prefix, "
            "mean over prefixes, then paths, then seeds"
        )
    found = finding_of(losses, choosing, references, conventions, curves)
    subject = Subject(
        model=attention.member(0),
        untrained=jw.init(attention.config.model, jax.random.key(0)),
        world=data.world,
        store=data.store,
        step=config.steps,
    )
    return [found, jw.analyses.analyse("association", subject, {"paths": min(paths, 256)})]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*NAMES, "all"), help="a world, pydoc (English in bytes), or all of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of training, a multiple of 10; by default each data set's own")
    parser.add_argument("--width", type=int, help="of the models")
    parser.add_argument("--depth", type=int, help="of the models")
    parser.add_argument("--paths", type=int, default=512, help="held-out paths, and as many to choose the fixed A on")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/association_ladder"))
    chosen = parser.parse_args(arguments)
    for name in NAMES if chosen.name == "all" else (chosen.name,):
        config = config_of(name)
        width, depth = chosen.width or config.model.width, chosen.depth or config.model.depth
        model = dataclasses.replace(config.model, width=width, depth=depth, filter=MLPConfig(hidden=4 * width))
        config = dataclasses.replace(config, model=model, steps=chosen.steps or config.steps)
        findings = ladder(config, chosen.seeds, chosen.paths)
        print("\n" + jw.report.table(findings) + "\n", flush=True)
        facts = {"training": findings[0].conventions["training"], "parameters": findings[0].conventions["parameters"]}
        written = jw.report.write(findings, {}, chosen.out / name, title=f"association ladder, {name}", facts=facts)
        print(*written.notices, f"written: {chosen.out / name}", sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
