"""Steer a walk: push a station from one kind of context towards another, and see where the paths go.

    python examples/steer_walk.py [RUN]

The kinds are contexts after which the world is almost surely in its second hidden state (here) or in its first (there):
two corners of Mess3's triangle of beliefs. The steering vector is the difference of their mean stations. Added to one
station of a context of the one kind (a nudge), it should make what follows be what follows the other. But any push
changes something: the null is random directions of the same length. The derivative says what a linear walk would do.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxwalk as jw
from jaxwalk.analyses import Subject, open_subject
from jaxwalk.config import OptimConfig, TrainConfig, WorldData
from jaxwalk.paths import continuations

LENGTH, STEPS = 8, 4  # of a context, and of the paths that go on from it
CONTEXTS, DIRECTIONS, STRENGTHS = 8, 5, (-1.0, 0.1, 0.25, 0.5, 2.0)


def trained(steps: int = 300) -> Subject:
    """A model trained here, in half a minute on two cores, and kept in memory; an untrained one; and the world."""
    model = jw.ModelConfig(vocab_size=3, max_length=16, width=64, depth=3)
    optim = OptimConfig(lr=3e-3, warmup=30, weight_decay=0.01, final_lr=0.01)
    config = TrainConfig("mess3", model, WorldData("mess3"), optim, batch_size=256, steps=steps)
    learned = jw.sweep.train(config, seeds=[0], report=print).member(0)
    return Subject(model=learned, untrained=jw.init(model, jax.random.key(0)), world=jw.worlds.mess3())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run's folder; by default runs/mess3, or a model trained here")
    chosen = parser.parse_args(arguments)
    run = chosen.run or ("runs/mess3" if Path("runs/mess3").exists() else None)
    subject = trained() if run is None else open_subject(run)
    model, world = subject.model, subject.world
    S, D, T = 2 * model.depth + 1, model.width, LENGTH + STEPS
    if not hasattr(world, "beliefs") or model.vocab_size**STEPS > 1000 or model.max_length < T:
        parser.error(f"run: expected one on a hidden Markov world of few tokens, such as mess3, of {T} positions")

    # Distinct contexts, of which the tenth that is surest of a state. One half makes the vector, others are pushed.
    contexts = np.random.default_rng(0).permutation(np.unique(subject.paths(4096, LENGTH), axis=0))
    beliefs = np.asarray(jax.vmap(world.beliefs)(contexts))[:, -1]
    here, there = (contexts[beliefs[:, state] >= np.quantile(beliefs[:, state], 0.9)] for state in (1, 0))
    stations = jax.jit(jax.vmap(lambda path: model.walk(path).stations[:, -1]))  # of the last position: [S, D] each
    half = min(len(here), len(there)) // 2
    steer = stations(there[:half]).mean(0) - stations(here[:half]).mean(0)
    here, there = (np.asarray(kind[half : half + CONTEXTS]) for kind in (here, there))

    after = continuations(model.vocab_size, STEPS)  # all of them, so that what is summed over them is exact
    event = jax.vmap(jw.visits(0))(after)
    join = jax.vmap(lambda context: jax.vmap(lambda more: jnp.concatenate([context, more]))(after))  # [C, V^n, T]
    each = lambda function: jax.vmap(jax.vmap(function))

    @jax.jit
    def probability(contexts: jax.Array, push: jax.Array) -> jax.Array:
        """P(visit token 0 within STEPS), mean of the contexts, where `push` [S, D] is added at the last position."""
        nudge = jnp.zeros((S, T, D)).at[:, LENGTH - 1].set(push)
        log_probs = each(lambda path: jw.path_log_prob(model, path, LENGTH, nudge))(join(contexts))
        return jnp.where(event, jnp.exp(log_probs), 0).sum(1).mean()

    # To first order a path's probability gains itself times the gradient of its logarithm times the push.
    P = jnp.exp(each(lambda path: jw.path_log_prob(model, path, LENGTH))(join(here)))
    gradient = each(lambda path: jw.station_gradient(model, path, LENGTH)[:, LENGTH - 1])(join(here))
    slope = jnp.einsum("cn,cnsd,sd->s", event * P, gradient, steer) / len(here)

    random = np.random.default_rng(1).normal(size=(DIRECTIONS, S, D))
    random *= np.linalg.norm(steer, axis=-1, keepdims=True) / np.linalg.norm(random, axis=-1, keepdims=True)
    start, target = (float(probability(kind, jnp.zeros((S, D)))) for kind in (here, there))
    symbol, middle = subject.symbol(0), S // 2
    print(f"\nP(the walk visits {symbol} within {STEPS} steps): {start:.4f} here, {target:.4f} there. Here, pushed:")
    print("station  strength  length   steered   random (spread)   first order")
    for s, strength in [(s, 1.0) for s in range(S)] + [(middle, strength) for strength in STRENGTHS]:
        pushed = lambda by, s=s, a=strength: float(probability(here, jnp.zeros((S, D)).at[s].set(a * by[s])))
        steered, others, first = pushed(steer), [pushed(by) for by in random], start + strength * float(slope[s])
        mean, spread, length = np.mean(others), np.std(others, ddof=1), abs(strength) * np.linalg.norm(steer[s])
        print(f"{s:>7}{strength:>+10.2f}{length:>8.1f}{steered:>10.4f}{mean:>9.4f} ({spread:.4f}){first:>14.4f}")
        if (s, strength) == (middle, 1.0):
            share = [f"{(p - start) / (target - start):.0%}" for p in (steered, mean, start + spread, first)]

    # One path, changed at each station of each position by itself: a sweep is one call.
    path, lent = (np.append(kind[0], np.zeros(STEPS, int)) for kind in (here, there))
    everywhere = jnp.broadcast_to(steer[:, None], (S, T, D))
    sweeps = {
        "is pushed": jw.nudge_effects(model, path, everywhere, LENGTH),
        "is that of the second path": jw.patch_effects(model, path, model.walk(lent).stations, LENGTH),
    }
    for name, effects in sweeps.items():
        print(f"\nlog P({symbol * STEPS} | here) gains, in nats, where one station of one position {name}")
        for one in (path, lent):
            print(" " * 9 + "".join(f"{subject.symbol(t):>7}" for t in one[:-1].tolist()))
        for s, row in enumerate(effects):
            print(f"station {s}" + "".join(f"{x:>+7.2f}" for x in row[:-1]))
    print(
        f"\nSeen: pushed at station {middle}, P(visit {symbol}) goes {share[0]} of the way from here to there;\n"
        f"pushed as far in random directions, {share[1]} ± {share[2]}; a linear walk would go {share[3]}."
    )


if __name__ == "__main__":
    main()
