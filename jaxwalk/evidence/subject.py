"""What an analysis receives: a trained model, its untrained version, and the data whose law it learned, or a text."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxwalk import checkpoint, pretrained, text
from jaxwalk.config import ConfigError, ModelConfig, TrainConfig, WorldData
from jaxwalk.evidence.finding import NotApplicable
from jaxwalk.model import Transformer, init, plain
from jaxwalk.model.inputs import check_tokens

FEWEST_PATHS = 8
"""The fewest paths of a text that are measured."""


class Draw(NamedTuple):
    """Paths of a world or a text.

    Attributes:
        tokens: [n, T].
        documents: [n], the document that each is from. Paths of one document are not independent.
    """

    tokens: Int[np.ndarray, "n T"]
    documents: Int[np.ndarray, " n"]


def _disjoint_windows(split: text.Split, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The starts, and the documents, of as many windows as each document has room for, from a random offset on."""
    sizes = np.diff([*split.starts, len(split.tokens)])
    counts = sizes // length
    documents = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = (rng.random(len(sizes)) * (sizes - counts * length + 1)).astype(np.int64)
    return np.asarray(split.starts)[documents] + offsets[documents] + within * length, documents


@dataclass(frozen=True)
class Subject:
    """A model and everything that its numbers are compared with.

    Attributes:
        model: the model to analyse.
        vocabulary: its vocabulary, or None.
        untrained: the same model at step 0, the null of every claim about training. For a pretrained model without a
            step 0, a freshly initialised one of its architecture. None if there is neither.
        world: the world that the data comes from, whose law is known exactly, or None.
        store: the token store of a text model, or None.
        pieces: whether the store holds a text cut into pieces for analysis (`text.cut`) instead of the training corpus.
        prompt: the token ids of the user's prompt, or None.
        step: the training step of the model, or None.
        training_tokens: the number of tokens that the model was trained on; 0 if it is not known.
        training_paths: (step) -> the paths [M, N] of a world that were trained on before a step; None if not known.
        series: the training steps that `at_step` can load.
        load_step: loads the model of a step, or None.
        seed: the seed of the paths that are drawn.
        workdir: the run's folder, or None.
        name: the name of the model in reports; by default the name of the run's folder.
        missing: what is missing that should be there (such as "store" or "untrained") -> the reason.
        remarks: further facts for the report.
        config: the options that fresh models of this architecture are initialised with, or None.
    """

    model: Transformer
    vocabulary: Any = None
    untrained: Transformer | None = None
    world: Any = None
    store: Any = None
    pieces: bool = False
    prompt: Int[np.ndarray, " P"] | None = None
    step: int | None = None
    training_tokens: int = 0
    training_paths: Callable[[int], Int[np.ndarray, "M N"]] | None = None
    series: tuple[int, ...] = ()
    load_step: Callable[[int], Transformer] | None = None
    seed: int = 0
    workdir: Path | None = None
    name: str = ""
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: ModelConfig | None = None

    @property
    def length(self) -> int:
        """The number of tokens of a path that are walked: those of a piece of text, otherwise max_length."""
        return len(self.store.validation.document(0)) - 1 if self.pieces else self.model.max_length

    def draw(self, n: int, length: int | None = None, *, to_fit: bool = False) -> Draw:
        """At most n paths of `length` tokens, and the document of each. The same call returns the same paths.

        From a world, they are fresh samples, each of them a document. From text, they are disjoint windows, each within
        one document of the validation split. From a text cut into pieces, they are the beginnings of pieces.

        Args:
            n: the number of paths. There are fewer if the text is too short, but at least 8.
            length: the number of tokens of each; `self.length` by default.
            to_fit: draw from other data, on which nulls and maps are fitted that are scored on held-out paths: other
                samples of a world, documents of the training split, or the pieces that are not measured.

        Raises:
            NotApplicable: if there is not enough data.
        """
        length = self.length if length is None else length
        if self.world is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), 0xF17 if to_fit else 0x5EED)
            return Draw(np.asarray(self.world.sample(key, n, length)), np.arange(n))
        if self.store is None:
            raise NotApplicable(f"paths: expected a world or a token store, got {self.no_data}.")
        split = self.store.train if to_fit else self.store.validation
        rng = np.random.default_rng(self.seed)
        starts, documents = self._pieces(split, length) if self.pieces else _disjoint_windows(split, length, rng)
        chosen = rng.permutation(len(starts))[:n]
        if len(chosen) < min(n, FEWEST_PATHS):
            raise NotApplicable(
                f"paths: expected {FEWEST_PATHS} windows of {length} tokens that lie in one document, found "
                f"{len(chosen)}. Analyse shorter paths, or use a corpus of longer documents."
            )
        tokens = split.tokens[starts[chosen, None] + np.arange(length)]
        return Draw(tokens.astype(np.int32), documents[chosen])

    def paths(self, n: int, length: int | None = None) -> Int[np.ndarray, "n T"]:
        """The tokens of `draw`: held-out paths."""
        return self.draw(n, length).tokens

    def _pieces(self, split: text.Split, length: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.length + 1
        if length > size:
            raise NotApplicable(f"paths: expected at most {size} tokens, as the text is cut, got {length}.")
        return split.starts, np.arange(len(split.starts)) if split.sources is None else split.sources

    @property
    def no_data(self) -> str:
        """The reason why there is no data."""
        return self.missing.get("store", "a model without data")

    def at_step(self, step: int) -> "Subject":
        """The same subject with the model of another training step. Raises ValueError for a step not in `series`."""
        if self.load_step is None or step not in self.series:
            raise ValueError(f"step: expected one of {list(self.series)}, got {step}.")
        return dataclasses.replace(self, model=plain(self.load_step(step)), step=step)

    def untrained_models(self, n: int) -> list[Transformer]:
        """The untrained model and, as one initialisation is one draw, fresh ones of its architecture: n in all.

        Without a config, fresh ones are copies in which the entries of each matrix are permuted. The list is
        empty if there is no untrained model.
        """
        if self.untrained is None:
            return []
        if self.config is not None:
            fresh = (plain(init(self.config, jax.random.fold_in(jax.random.key(0xF4E5), i))) for i in range(1, n))
        else:
            fresh = (_permuted(self.untrained, np.random.default_rng(i)) for i in range(1, n))
        return [self.untrained, *fresh]

    def symbol(self, token: int | np.integer) -> str:
        """The displayed form of a token. It is untrusted text: escape it in HTML."""
        return str(token) if self.vocabulary is None else self.vocabulary.symbol(int(token))

    @property
    def title(self) -> str:
        """The title of the report."""
        name = self.name or (self.workdir.resolve().name if self.workdir else "model")
        return name if self.step is None else f"{name}, step {self.step}"

    def facts(self) -> dict[str, str]:
        """Facts about the model and its data for the report."""
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
            measured, fitted_on = (len(side.starts) for side in (self.store.validation, self.store.train))
            facts["data"] = (
                f"text, cut in pieces of {self.length} tokens: {measured} to measure on, {fitted_on} to fit nulls on"
            )
        elif self.store is not None:
            facts["data"] = f"text, {len(self.store.validation.tokens):,} held-out tokens"
        for name, reason in self.missing.items():
            facts[f"no {name}"] = reason
        return facts | dict(self.remarks)

    def metrics(self) -> list[dict[str, float]]:
        """The rows of the run's metrics.jsonl, or none if there is no such file."""
        return [] if self.workdir is None else checkpoint.read_metrics(self.workdir / "metrics.jsonl")


def _permuted(model: Transformer, rng: np.random.Generator) -> Transformer:
    """The model with the entries of each matrix permuted, within each layer, so that their distribution stays."""

    def leaf(a: Any) -> Any:
        rows = np.asarray(a).reshape(-1, *a.shape[-2:]) if a.ndim > 1 else None
        if rows is None or not np.issubdtype(rows.dtype, np.floating):
            return a
        mixed = np.stack([rng.permutation(row.ravel()) for row in rows])
        return jax.numpy.asarray(mixed.reshape(a.shape), a.dtype)

    return jax.tree.map(leaf, model)


def open_subject(
    source: str | os.PathLike[str],
    step: int | Literal["latest", "best"] = "latest",
    prompt: str | None = None,
    *,
    corpus: str | None = None,
    length: int | None = None,
) -> Subject:
    """The subject of a saved step of a run, or of any other source that `jaxwalk.load` accepts.

    If a run's data is gone, or its step 0 cannot be read, only what depends on it is unavailable: `missing` says why.

    Args:
        source: a run's folder, or a pretrained model.
        step: the training step of the model.
        prompt: text, in symbols of the model's vocabulary; token ids if the model has no vocabulary.
        corpus: a text to analyse instead of the run's own data: a file, or any corpus that `text.documents` reads. It
            is the only data of a pretrained model.
        length: the number of tokens of the pieces that the text is cut into (`text.cut`).

    Returns:
        The subject.

    Raises:
        CheckpointError: if the model cannot be read.
        ValueError: if the vocabulary cannot encode the prompt, or the model cannot walk it.
        ConfigError, CorpusError: if the corpus or the length cannot be used.
    """
    if length is not None and corpus is None:
        raise ConfigError(f"length: expected a text to cut into pieces of this length, got {length} and no text.")
    if pretrained.is_foreign(source):
        subject = _of_pretrained(source, step)
    else:
        subject = _of_run(source, step, own_data=corpus is None)
    model, vocabulary = subject.model, subject.vocabulary
    if corpus is not None:
        if vocabulary is None:
            raise ConfigError(f"text: expected a model with its tokenizer, got {source}, which has none.")
        store = text.cut(corpus, vocabulary, model.max_length, length)
        missing = {name: reason for name, reason in subject.missing.items() if name != "store"}
        remarks = {**subject.remarks, "text": corpus}
        subject = dataclasses.replace(subject, store=store, pieces=True, missing=missing, remarks=remarks)
    if prompt is not None:
        subject = dataclasses.replace(subject, prompt=_encoded(prompt, model, vocabulary))
    return subject


def _encoded(prompt: str, model: Transformer, vocabulary: Any) -> Int[np.ndarray, " P"]:
    """The encoded prompt after the begin-of-path token, if there is one. Without a vocabulary, it is token ids."""
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


def _of_pretrained(source: str | os.PathLike[str], step: int | Literal["latest", "best"]) -> Subject:
    """The subject of a pretrained model, with its series of training steps if it has one."""
    missing = {"store": "a pretrained model comes without its data: give a text, with --text"}
    try:
        steps = pretrained.series(source)
    except checkpoint.CheckpointError as error:
        steps, missing["series"] = {}, str(error)
    model, vocabulary = pretrained.load(source, step=step)

    def load_step(step: int) -> Transformer:  # by revision; loading by step number would list the repository again
        path = Path(source)
        local = path.exists()
        return pretrained.load(path / steps[step] if local else source, revision=None if local else steps[step])[0]

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
        config=pretrained.config_of(source),
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
    resolved, config = run.resolve(step), run.config
    return Subject(
        model=model,
        vocabulary=run.vocabulary,
        config=config.model,
        untrained=untrained,
        world=run.world if own_data else None,
        store=store,
        step=resolved,
        training_tokens=resolved * config.batch_size * config.model.max_length,
        training_paths=functools.partial(_sampled_in_training, config)
        if own_data and isinstance(config.data, WorldData)
        else None,
        series=run.steps,
        load_step=run.model,
        workdir=run.folder,
        missing=missing,
    )


def _sampled_in_training(config: TrainConfig, steps: int) -> Int[np.ndarray, "M N"]:
    """The paths of a world that a run has trained on after `steps` steps: batches are functions of their step."""
    from jaxwalk.training import make_batches  # late, as only few analyses need what trains

    data = make_batches(config)
    batch = jax.jit(lambda step: data.batch(step)[0])
    rows = [np.asarray(batch(step)) for step in range(steps)]
    return np.concatenate(rows) if rows else np.zeros((0, config.model.max_length + 1), np.int32)
