"""The fractal of belief states in a transformer's context vectors, found by hand with one least-squares fit.

    python examples/belief_fractal.py [RUN]

Whoever knows the world Mess3 and reads a path holds a belief: three probabilities, a point in a triangle. The belief
states of all paths form a fractal. A transformer that is trained to predict the next token was never told of it, and
yet one affine map takes its context vectors there (Shai et al., arXiv 2405.15943). So does, in part, a map from almost
anything that depends on the path: the same map is fitted to an untrained model and to the last token alone.
`python analyze.py RUN --only belief_geometry` does this with intervals and at every station of the walk.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import jaxwalk as jw
from jaxwalk.analyses import Subject, open_subject
from jaxwalk.config import OptimConfig, TrainConfig, WorldData

FORK, FOLDS = 6, 4
CORNERS = np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])  # where certainty of each of the three states is drawn


def trained(steps: int = 300) -> Subject:
    """A model trained here, in half a minute on two cores, and kept in memory; an untrained one; and the world."""
    model = jw.ModelConfig(vocab_size=3, max_length=16, width=64, depth=3)
    optim = OptimConfig(lr=3e-3, warmup=30, weight_decay=0.01, final_lr=0.01)
    config = TrainConfig("mess3", model, WorldData("mess3"), optim, batch_size=256, steps=steps)
    learned = jw.sweep.train(config, seeds=[0], report=print).member(0)
    return Subject(model=learned, untrained=jw.init(model, jax.random.key(0)), world=jw.worlds.mess3())


def read_off(features: np.ndarray, beliefs: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """What an affine map makes of the features [n, F]: in each fold, the map that is fitted to the other folds."""
    x = np.column_stack([features, np.ones(len(features))])  # the column of ones is the map's offset
    read = np.empty_like(beliefs)
    for fold in range(FOLDS):
        others = folds != fold
        read[~others] = x[~others] @ np.linalg.lstsq(x[others], beliefs[others])[0]
    return read


def draw(panels: dict[str, np.ndarray], file: Path) -> str:
    """Beliefs [n, 3] in the triangle, in the colours of the first panel's. Returns what became of it."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which wants a display
    except ImportError:
        return "no picture: it takes matplotlib, pip install 'jaxwalk[report]'"
    figure = Figure(figsize=(12, 4), layout="constrained")
    colours = np.clip(next(iter(panels.values())), 0, 1)  # three probabilities are also red, green and blue
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axes, (title, beliefs) in zip(grid, panels.items(), strict=True):
        axes.scatter(*(beliefs @ CORNERS).T, c=colours, s=2, linewidths=0)
        axes.set(title=title, aspect="equal")
        axes.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)
    return f"picture: {file}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run's folder; by default runs/mess3, or a model trained here")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/belief_fractal.png"))
    chosen = parser.parse_args(arguments)
    run = chosen.run or ("runs/mess3" if Path("runs/mess3").exists() else None)
    subject = trained() if run is None else open_subject(run)
    if getattr(subject.world, "num_states", None) != 3 or subject.untrained is None:
        parser.error("run: expected one with its step 0, on a world of three hidden states, such as mess3")

    paths = subject.paths(1024)
    beliefs = np.asarray(jax.vmap(subject.world.beliefs)(paths))[:, 1:]  # row 0 is the belief before any token
    context_vectors = jax.jit(jax.vmap(lambda model, path: model.walk(path).context, (None, 0)))
    contexts, untrained = (context_vectors(model, paths) for model in (subject.model, subject.untrained))
    features = {
        "trained": contexts,
        "untrained": untrained,
        "last token": np.eye(subject.world.vocab_size)[paths],
        "next law": jax.nn.softmax(jax.vmap(jax.vmap(subject.model.logits))(contexts)),
    }

    # Paths share prefixes, so a map fitted to some paths has seen prefixes of others. In folds of first words, with the
    # prefixes from that length on, each prefix is in one fold only.
    word = paths[:, :FORK] @ subject.world.vocab_size ** np.arange(FORK)
    fold = np.random.default_rng(0).permutation(word.max() + 1)[word] % FOLDS
    folds = fold.repeat(paths.shape[1] - FORK + 1)
    rows = lambda a: np.asarray(a, float)[:, FORK - 1 :].reshape(len(folds), -1)
    true, read = rows(beliefs), {name: read_off(rows(x), rows(beliefs), folds) for name, x in features.items()}
    r2 = {name: 1 - ((r - true) ** 2).sum() / ((true - true.mean(axis=0)) ** 2).sum() for name, r in read.items()}

    print(f"\nR² of the belief after {len(true)} prefixes, by an affine map that was fitted to other prefixes")
    print(*(f"  {name:<12}{value:.4f}" for name, value in r2.items()), sep="\n")
    print(draw({"belief states": true, "trained": read["trained"], "untrained": read["untrained"]}, chosen.out))
    gained = (r2["trained"] - r2["untrained"]) / (1 - r2["untrained"])
    print(
        f"Seen: context vectors hold the belief linearly with R² {r2['trained']:.4f}, the untrained model's with "
        f"{r2['untrained']:.4f},\nthe last token with {r2['last token']:.4f}: training closed {gained:.1%} of the gap. "
        f"The model's next law has {r2['next law']:.4f}:\nin Mess3 it determines the belief. Where contexts hold more "
        "than this law, as in configs/rrxor.py, the analysis tells."
    )


if __name__ == "__main__":
    main()
