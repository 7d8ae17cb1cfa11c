"""What an analysis is handed: a trained model, its untrained self, and the data whose law it learned."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxwalk.transformer import Transformer, plain


@dataclass(frozen=True)
class Subject:
    """A model and everything that its numbers are held against.

    model: the model that is analysed. untrained: the same model at step 0, the null of every claim about
    training; None where there is none (a foreign checkpoint). world: the data's exact law, or None. store: the
    token store of a text model, or None. prompt: token ids that the user asked about, or None. series: the steps
    of training that `at_step` can load. seed: of the paths that are drawn.
    """

    model: Transformer
    vocabulary: Any = None
    untrained: Transformer | None = None
    world: Any = None
    store: Any = None
    prompt: Int[np.ndarray, " P"] | None = None
    step: int | None = None
    series: tuple[int, ...] = ()
    load_step: Callable[[int], Transformer] | None = None
    seed: int = 0
    workdir: Path | None = None

    def paths(self, n: int, length: int | None = None) -> Int[np.ndarray, "n T"]:
        """n held-out paths of `length` tokens (by default what the model can walk, `max_length`).

        From a world they are fresh samples; from text, windows of the validation split that lie in one document.
        The same call gives the same paths. Raises ValueError if the data has not enough of them.
        """
        length = self.model.max_length if length is None else length
        if self.world is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), 0x5EED)
            return np.asarray(self.world.sample(key, n, length))
        if self.store is None:
            raise ValueError("paths: expected a world or a token store, got a model without data. Pass text to analyse.")
        found: list[np.ndarray] = []
        for attempt in range(100):
            tokens, segments = self.store.batch(self.seed, attempt, max(n, 64), length, split="validation")
            whole = (segments == segments[:, :1]).all(axis=1) & (segments[:, 0] > 0)
            found.extend(tokens[whole])
            if len(found) >= n:
                return np.stack(found[:n])
        raise ValueError(
            f"paths: expected {n} windows of {length} tokens that lie in one document, found {len(found)}. "
            "Analyse shorter paths, or use a corpus of longer documents."
        )

    def at_step(self, step: int) -> "Subject":
        """The same subject with the model of another training step."""
        if self.load_step is None or step not in self.series:
            raise ValueError(f"step: expected one of {list(self.series)}, got {step}.")
        return dataclasses.replace(self, model=plain(self.load_step(step)), step=step)

    def symbol(self, token: int) -> str:
        """How one token is shown. Untrusted text: escape it where it meets HTML."""
        return str(token) if self.vocabulary is None else self.vocabulary.symbol(int(token))
