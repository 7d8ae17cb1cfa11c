"""One prediction of a trained model, split exactly: by token, by step, by head and source; beside three other answers.

    python examples/decompose_prediction.py [RUN]

Hold every coefficient that depends on the data (patterns, norms, gates, the next-step law) at the value it took, and
log p(next token | path) is affine in the token vectors: what each token, step and head gives adds up to it, to
rounding. That is arithmetic, and holds for an untrained model too. Whether a token's part says what the token did is
another question, so parts are held against what the world says, beside three attributions that need not add up.
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

jax.config.update("jax_enable_x64", True)  # before any array is made: those made before would stay float32

LENGTH, PATHS = 12, 16
METHODS = (jw.held_attribution, jw.gradient_attribution, jw.integrated_gradients, jw.occlusion)


def trained(steps: int = 300) -> Subject:
    """A model trained here, in half a minute on two cores, and kept in memory; an untrained one; and the world."""
    model = jw.ModelConfig(vocab_size=3, max_length=16, width=64, depth=3)
    optim = OptimConfig(lr=3e-3, warmup=30, weight_decay=0.01, final_lr=0.01)
    config = TrainConfig("mess3", model, WorldData("mess3"), optim, batch_size=256, steps=steps)
    learned = jw.sweep.train(config, seeds=[0], report=print).member(0)
    return Subject(model=learned, untrained=jw.init(model, jax.random.key(0)), world=jw.worlds.mess3())


def hidden(world: jw.worlds.World, path: jax.Array) -> jax.Array:
    """[T-1]: how far log p(last token | those before it) falls, in the world, when token j is not known. Exact."""

    def without(j: jax.Array) -> jax.Array:
        paths = jax.vmap(lambda v: path.at[j].set(v))(jnp.arange(world.vocab_size, dtype=path.dtype))
        log_sum = lambda paths: jax.nn.logsumexp(jax.vmap(world.path_log_prob)(paths))
        return log_sum(paths) - log_sum(paths[:, :-1])

    return world.path_log_prob(path, given=len(path) - 1) - jax.vmap(without)(jnp.arange(len(path) - 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run's folder; by default runs/mess3, or a model trained here")
    chosen = parser.parse_args(arguments)
    run = chosen.run or ("runs/mess3" if Path("runs/mess3").exists() else None)
    subject = trained() if run is None else open_subject(run)
    if subject.world is None or subject.untrained is None:
        parser.error("run: expected one with its step 0, on a world, as the parts are held against what a world says")
    model, null = (jw.astype(m, jnp.float64) for m in (subject.model, subject.untrained))
    paths = jnp.asarray(subject.paths(PATHS, min(LENGTH, model.max_length) + 1))
    path, token = paths[0, :-1], paths[0, -1]  # the prediction that is printed; at the end all are looked at
    law = jw.next_log_probs(model, path)[-1]
    *words, next_word = map(subject.symbol, paths[0].tolist())
    print(f"\nlog p({next_word} | {' '.join(words)}) = {law[token]:.6f} nats")

    answers, nulls = (
        [jax.vmap(method, (None, 0, 0))(m, paths[:, :-1], paths[:, -1]) for method in METHODS] for m in (model, null)
    )
    true = jax.jit(jax.vmap(hidden, (None, 0)))(subject.world, paths)
    print("\nby token         held  grad x input  integrated   occlusion  the world")
    for t, word in enumerate(words):
        print(f"{t:>3} {word:<5}", *(f"{a.by_token[0, t]:>+11.4f}" for a in answers), f"{true[0, t]:>+10.4f}")
    print("sum      ", *(f"{a.by_token[0].sum():>+11.4f}" for a in answers))
    # Held parts sum to log p less what is listed below; the others to what log p gains from all tokens being the mean.
    print("should be", *(f"{a.whole[0] - a.rest[0]:>+11.4f}" for a in answers))
    print("gap      ", *(f"{a.gap[0]:>+11.0e}" for a in answers))

    parts = jw.decompose(model, path)
    direction, constant = jw.log_prob_readout(model, parts.whole, token)  # log p = direction . context + constant
    shares = [part @ direction for part in (parts.by_token.sum(0), parts.by_position.sum(0), parts.bias)]
    entropy = -jnp.sum(jnp.exp(law) * law)  # the constant is minus the law's entropy, and biases of the logits if any
    listed = "held: tokens {:+.4f}, positions {:+.4f}, biases {:+.4f}, logit biases {:+.4f}, entropy {:+.4f} = {:.6f}"
    print(listed.format(*shares, constant + entropy, -entropy, sum(shares) + constant))

    steps, both = jw.decompose_steps(model, path), jw.decompose_steps_by_token(model, path)
    heads = [jw.decompose_heads(model, path, layer) for layer in range(model.depth)]
    adds = steps.by_step + steps.by_step_bias
    print("\nby step    attention     filter   attention by head (the strongest source of each)")
    for layer, by_head in enumerate(h.by_head @ direction for h in heads):
        attention, filter = adds[2 * layer : 2 * layer + 2] @ direction
        by = "  ".join(f"{a.sum():+.3f} ({a[t]:+.3f} from {t})" for a in by_head for t in [jnp.abs(a).argmax()])
        print(f"layer {layer}  {attention:>+11.4f}{filter:>+11.4f}   {by}")
    direct, stepwise = (steps.token + steps.position + steps.bias) @ direction, adds.sum(0) @ direction
    print(f"direct {direct:+.4f}, steps {stepwise:+.4f}, constant {constant:+.4f} = {direct + stepwise + constant:.6f}")

    cuts = {"tokens": parts, "steps": steps, "steps x tokens": both} | {f"heads {n}": h for n, h in enumerate(heads)}
    print("\nrelative errors:", ", ".join(f"{name} {cut.error:.0e}" for name, cut in cuts.items()))
    by_token = both.by_token.sum(0).at[-1].add(both.token)  # what the last token gives directly is no step's
    of_steps = both.by_token.sum(1) + both.by_position.sum(1) + both.by_step_bias
    of_heads = jnp.stack([h.by_head.sum((0, 1)) + h.bias for h in heads])
    apart = (jnp.abs(a).max() for a in (by_token - parts.by_token, of_steps - adds, of_heads - adds[::2]))
    agree = "steps x tokens agree with tokens to {:.0e}, with steps to {:.0e}; heads with steps to {:.0e}"
    print(agree.format(*apart))

    alike = [[np.corrcoef(a.by_token.ravel(), true.ravel())[0, 1] for a in of] for of in (answers, nulls)]
    print(f"\ncorrelation with the world, over {true.size} tokens of {len(paths)} paths")
    for name, row in zip(("trained", "untrained"), alike, strict=True):
        print(f"{name:<9}", *(f"{x:>+11.2f}" for x in row))
    gap, null_gap = (float(jnp.abs(of[0].gap).max()) for of in (answers, nulls))
    print(
        f"Seen: held parts sum to each prediction within {gap:.0e} nats, untrained within {null_gap:.0e}: arithmetic.\n"
        f"What they give to tokens goes with what these tell in the world, correlation {alike[0][0]:.2f} (untrained "
        f"{alike[1][0]:.2f});\nocclusion, which need not add up, has {alike[0][3]:.2f} (untrained {alike[1][3]:.2f})."
    )


if __name__ == "__main__":
    main()
