"""What an analysis is handed: a trained model, its untrained self, and the data whose law it learned, or a text."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from jaxwalk import checkpoint, pretrained, text
from jaxwalk.config import ConfigError
from jaxwalk.evidence.finding import NotApplicable
from jaxwalk.model import Transformer, init, plain
from jaxwalk.model.inputs import check_tokens


@dataclass(frozen=True)
class Subject:
    """A model and everything that its numbers are held against.

    model: the model that is analysed. untrained: the same model at step 0, the null of every claim about
    training, or, of a foreign checkpoint, a fresh one of its architecture; None where there is none. world: the data's
    exact law, or None. store: the token store of a text model, or None. pieces: whether it holds a text that was cut
    for looking at (`text.cut`), and not the corpus of the training. prompt: token ids that the user asked about, or
    None. series: the steps of training that `at_step` can load. seed: of the paths that are drawn. workdir: the run's
    folder. name: what the report calls the model; by default the name of the run's folder. missing: why there is no
    store, or no untrained model, where there should be one. remarks: more of what the report says about it.
    """

    model: Transformer
    vocabulary: Any = None
    untrained: Transformer | None = None
    world: Any = None
    store: Any = None
    pieces: bool = False
    prompt: Int[np.ndarray, " P"] | None = None
    step: int | None = None
    series: tuple[int, ...] = ()
    load_step: Callable[[int], Transformer] | None = None
    seed: int = 0
    workdir: Path | None = None
    name: str = ""
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        """How many tokens of a path are walked: of a text cut in pieces those of a piece, else all the model can."""
        return len(self.store.validation.document(0)) - 1 if self.pieces else self.model.max_length

    def paths(self, n: int, length: int | None = None) -> Int[np.ndarray, "n T"]:
        """n held-out paths of `length` tokens (by default `self.length`).

        From a world they are fresh samples; from text, windows of the validation split that lie in one document. Of a
        text cut in pieces they are the pieces' beginnings, in a random order, and there may be fewer than n. The same
        call gives the same paths. Raises NotApplicable if the data has not enough of them.
        """
        length = self.length if length is None else length
        if self.world is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), 0x5EED)
            return np.asarray(self.world.sample(key, n, length))
        if self.store is None:
            raise NotApplicable(f"paths: expected a world or a token store, got {self.no_data}.")
        if self.pieces:
            pieces = self.store.validation.tokens.reshape(len(self.store.validation.starts), -1)
            if length > pieces.shape[1]:
                raise NotApplicable(
                    f"paths: expected at most {pieces.shape[1]} tokens, as the text is cut, got {length}."
                )
            return pieces[np.random.default_rng(self.seed).permutation(len(pieces))[:n], :length].astype(np.int32)
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
        name = self.name or (self.workdir.resolve().name if self.workdir else "model")
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
        elif self.pieces:
            held_out, fitted = (len(side.starts) for side in (self.store.validation, self.store.train))
            facts["data"] = (
                f"text, cut in pieces of {self.length} tokens: {held_out} that are measured, {fitted} that nulls are "
                "fitted on"
            )
        elif self.store is not None:
            facts["data"] = f"text, {len(self.store.validation.tokens):,} held-out tokens"
        for what, reason in self.missing.items():
            facts[f"no {what}"] = reason
        return facts | dict(self.remarks)

    def metrics(self) -> list[dict[str, float]]:
        """The rows of the run's metrics.jsonl; none where there is no such file."""
        return [] if self.workdir is None else checkpoint.read_metrics(self.workdir / "metrics.jsonl")


def open_subject(
    source: str | os.PathLike[str],
    step: int | Literal["latest", "best"] = "latest",
    prompt: str | None = None,
    *,
    corpus: str | None = None,
    length: int | None = None,
) -> Subject:
    """The subject of a run's folder at one of its kept steps, or of whatever else `jaxwalk.load` loads.

    prompt: text, in symbols of the model's vocabulary. corpus: a text to look at, instead of the run's own data: a file
    or what `text.documents` reads, cut in pieces of `length` tokens (`text.cut`). A foreign checkpoint has no data
    otherwise. Of a run, data that is gone, or a step 0 that cannot be read, costs what needs it and no more: `missing`
    says why. Raises CheckpointError for what cannot be read, ValueError for a prompt that the vocabulary cannot encode
    or the model cannot walk, ConfigError (CorpusError) for a corpus or a length that cannot be used.
    """
    if length is not None and corpus is None:
        raise ConfigError(f"length: expected a text that is cut in pieces so long, got {length} and none.")
    if pretrained.is_foreign(source):
        subject = _foreign(source, step)
    else:
        subject = _of_run(source, step, own_data=corpus is None)
    model, vocabulary = subject.model, subject.vocabulary
    if corpus is not None:
        if vocabulary is None:
            raise ConfigError(f"text: expected a model with its tokenizer, got {source}, which has none.")
        store = text.cut(corpus, vocabulary, model.max_length, length)
        missing = {what: why for what, why in subject.missing.items() if what != "store"}
        remarks = {**subject.remarks, "text": corpus}
        subject = dataclasses.replace(subject, store=store, pieces=True, missing=missing, remarks=remarks)
    if prompt is not None:
        subject = dataclasses.replace(subject, prompt=_encoded(prompt, model, vocabulary))
    return subject


def _encoded(prompt: str, model: Transformer, vocabulary: Any) -> Int[np.ndarray, " P"]:
    """The begin-of-path token, if there is one, and the prompt. Where there is no vocabulary it is given as ids."""
    if vocabulary is None:
        try:
            tokens = np.array([int(word) for word in prompt.replace(",", " ").split()])
        except ValueError as error:
            raise ValueError(
                f"prompt: expected token ids, as the model came without a tokenizer, got {prompt!r}."
            ) from error
    else:
        tokens = np.asarray(vocabulary.encode(prompt))
        if vocabulary.begin is not None:
            tokens = np.concatenate([[vocabulary.begin], tokens])
    return np.asarray(check_tokens(model, tokens))


def _foreign(source: str | os.PathLike[str], step: int | Literal["latest", "best"]) -> Subject:
    """A pretrained model, in its series of steps if there is one, and as it was at step 0, or might have been."""
    missing = {"store": "a pretrained model comes without its data: give a text, with --text"}
    try:
        steps = pretrained.series(source)
    except checkpoint.CheckpointError as error:
        steps, missing["series"] = {}, str(error)
    model, vocabulary = pretrained.load(source, step=step)

    def load_step(step: int) -> Transformer:  # by name, as a repository would be listed again for its number
        path = Path(source)
        inside = path.exists()
        return pretrained.load(path / steps[step] if inside else source, revision=None if inside else steps[step])[0]

    untrained, remarks = None, {}
    if 0 in steps:
        try:
            untrained = load_step(0)
        except checkpoint.CheckpointError as error:
            missing["step 0"] = str(error)
    if untrained is None:
        untrained = init(pretrained.config_of(source), jax.random.key(0))
        remarks["untrained model"] = "a fresh one of this architecture, initialised by jaxwalk, as there is no step 0"
    return Subject(
        model=plain(model),
        vocabulary=vocabulary,
        untrained=plain(untrained),
        step=step if isinstance(step, int) else None,
        series=tuple(steps),
        load_step=load_step if steps else None,
        name=(Path(source).stem if Path(source).is_file() else Path(source).resolve().name) or "model",
        missing=missing,
        remarks=remarks,
    )


def _of_run(folder: str | os.PathLike[str], step: int | Literal["latest", "best"], own_data: bool) -> Subject:
    run = checkpoint.Run(folder)
    model = plain(run.model(step))
    missing: dict[str, str] = {}
    store = untrained = None
    if own_data:
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
        world=run.world if own_data else None,
        store=store,
        step=run.resolve(step),
        series=run.steps,
        load_step=run.model,
        workdir=run.folder,
        missing=missing,
    )
