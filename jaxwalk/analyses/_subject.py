"""What an analysis is handed: a trained model, its untrained self, and the data whose law it learned."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from jaxwalk import checkpoint, text
from jaxwalk.analyses._finding import NotApplicable
from jaxwalk.transformer import Transformer, check_tokens, plain


@dataclass(frozen=True)
class Subject:
    """A model and everything that its numbers are held against.

    model: the model that is analysed. untrained: the same model at step 0, the null of every claim about
    training; None where there is none (a foreign checkpoint). world: the data's exact law, or None. store: the
    token store of a text model, or None. prompt: token ids that the user asked about, or None. series: the steps
    of training that `at_step` can load. seed: of the paths that are drawn. missing: why there is no store, or no
    untrained model, where there should be one.
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
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def paths(self, n: int, length: int | None = None) -> Int[np.ndarray, "n T"]:
        """n held-out paths of `length` tokens (by default what the model can walk, `max_length`).

        From a world they are fresh samples; from text, windows of the validation split that lie in one document.
        The same call gives the same paths. Raises NotApplicable if the data has not enough of them.
        """
        length = self.model.max_length if length is None else length
        if self.world is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), 0x5EED)
            return np.asarray(self.world.sample(key, n, length))
        if self.store is None:
            raise NotApplicable(f"paths: expected a world or a token store, got {self.no_data}.")
        found: list[np.ndarray] = []
        for attempt in range(100):
            tokens, segments = self.store.batch(self.seed, attempt, max(n, 64), length, split="validation")
            whole = (segments == segments[:, :1]).all(axis=1) & (segments[:, 0] > 0)
            found.extend(tokens[whole])
            if len(found) >= n:
                return np.stack(found[:n])
        raise NotApplicable(
            f"paths: expected {n} windows of {length} tokens that lie in one document, found {len(found)}. "
            "Analyse shorter paths, or use a corpus of longer documents."
        )

    @property
    def no_data(self) -> str:
        """Why there is no data."""
        return self.missing.get("store", "a model without data")

    def at_step(self, step: int) -> "Subject":
        """The same subject with the model of another training step."""
        if self.load_step is None or step not in self.series:
            raise ValueError(f"step: expected one of {list(self.series)}, got {step}.")
        return dataclasses.replace(self, model=plain(self.load_step(step)), step=step)

    def symbol(self, token: int | np.integer) -> str:
        """How one token is shown. Untrusted text: escape it where it meets HTML."""
        return str(token) if self.vocabulary is None else self.vocabulary.symbol(int(token))

    @property
    def title(self) -> str:
        """What the report is about."""
        name = self.workdir.resolve().name if self.workdir else "model"
        return name if self.step is None else f"{name}, step {self.step}"

    def facts(self) -> dict[str, str]:
        """What the report says about the model and its data."""
        model = self.model
        kinds = list(dict.fromkeys(type(layer.aggregate).__name__ for layer in model.layers))
        facts = {
            "model": f"{model.depth} layers of {', '.join(kinds) or 'nothing'}, width {model.width}, "
            f"{model.layers[0].placement if model.layers else 'no'}-norm, at most {model.max_length} tokens",
            "parameters": f"{sum(a.size for a in jax.tree.leaves(model)):,}",
            "vocabulary": f"{model.vocab_size} tokens",
        }
        if self.world is not None:
            facts["data"] = f"the world {self.world}, whose path law is known exactly"
        elif self.store is not None:
            facts["data"] = f"text, {len(self.store.validation.tokens):,} held-out tokens"
        for what, reason in self.missing.items():
            facts[f"no {what}"] = reason
        return facts

    def metrics(self) -> list[dict[str, float]]:
        """The rows of the run's metrics.jsonl; none where there is no such file."""
        return [] if self.workdir is None else checkpoint.read_metrics(self.workdir / "metrics.jsonl")


def open_subject(
    folder: str | os.PathLike[str], step: int | Literal["latest", "best"] = "latest", prompt: str | None = None
) -> Subject:
    """The subject of a run's folder at one of its kept steps, with its data and its untrained self.

    prompt: text, in symbols of the run's vocabulary. Data that is gone, or a step 0 that cannot be read, costs what
    needs it and no more: `missing` says why. Raises CheckpointError for a step that is not there or cannot be read,
    ValueError for a prompt that the vocabulary cannot encode or the model cannot walk.
    """
    run = checkpoint.Run(folder)
    model = plain(run.model(step))
    tokens = None
    if prompt is not None:
        tokens = np.asarray(run.vocabulary.encode(prompt))
        if run.vocabulary.begin is not None:
            tokens = np.concatenate([[run.vocabulary.begin], tokens])
        tokens = np.asarray(check_tokens(model, tokens))
    missing: dict[str, str] = {}
    store = untrained = None
    try:
        store = run.store
    except (text.CorpusError, text.StoreError, ImportError) as error:
        missing["store"] = str(error)
    if 0 in run.steps:
        try:
            untrained = plain(run.model(0))
        except checkpoint.CheckpointError as error:
            missing["untrained"] = str(error)
    return Subject(
        model=model,
        vocabulary=run.vocabulary,
        untrained=untrained,
        world=run.world,
        store=store,
        prompt=tokens,
        step=run.resolve(step),
        series=run.steps,
        load_step=run.model,
        workdir=run.folder,
        missing=missing,
    )
