"""Corpora: the documents that a `TextData` names, from CPython's help, local files, or the Hugging Face hub."""

import glob
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxwalk.config import TextData, unknown
from jaxwalk.text._errors import CorpusError, one_line, optional

OFFLINE_HINT = (
    "Without a network, use corpus='pydoc' (English that ships inside CPython), "
    "or a local .txt, .jsonl or .parquet file, folder or glob."
)
LOADERS = {".jsonl": "json", ".parquet": "parquet"}
"""The loader of `datasets` for each suffix of a file of rows."""
_SUFFIXES = (".txt", *LOADERS)
_HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer; its own client retries for minutes."""


def documents(config: TextData) -> Iterator[str]:
    """Yield the documents of the corpus, in a fixed order. Empty and null texts are left out.

    - "pydoc": the topics of CPython's own help, `pydoc_data.topics`, sorted by topic: 79 documents, about 480 kB of
      English. The text differs a little between Python versions.
    - Local files, sorted by path: a .txt file is one document; each row of a .jsonl or .parquet file is one, with its
      text in `config.column`. Folders are searched recursively; files with other suffixes are ignored.
    - Any other name is that of a dataset on the hub: one that does not exist on disk, is no absolute path, and has no
      wildcard and none of these suffixes.

    Rows of local files are always streamed; a dataset on the hub is streamed with `config.streaming`, and otherwise
    downloaded first. Either way, memory grows with the largest document and not with the corpus.

    Raises:
        CorpusError: if the corpus does not exist or cannot be reached, has no such column, or has a document that is
            not text in UTF-8.
        ImportError: if a package of the extra `text` is needed and is not installed.
    """
    if config.corpus == "pydoc":
        yield from pydoc_topics(config).values()
    elif (files := local_files(config)) is not None:
        for file in files:
            yield from read_text_file(file) if file.suffix.lower() == ".txt" else _documents_of_file(file, config)
    else:
        yield from _documents_of_hub(config)


# CPython's help.


def pydoc_topics(config: TextData) -> dict[str, str]:
    """The texts of CPython's help by topic, sorted by topic.

    Raises:
        CorpusError: if this Python was installed without them, or if the config chooses a subset or split.
    """
    _refuse_hub_options(config)
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise CorpusError(
            "corpus 'pydoc': expected the module pydoc_data.topics of CPython's standard library, but this "
            "Python was installed without it. Use another Python, or a local .txt, .jsonl or .parquet file."
        ) from error
    return {topic: topics[topic] for topic in sorted(topics) if topics[topic]}


def _refuse_hub_options(config: TextData) -> None:
    if config.subset is not None or config.split != "train":
        raise CorpusError(
            f"corpus {config.corpus!r}: expected no subset and split='train', as only datasets on the hub have "
            f"subsets and splits, got subset={config.subset!r}, split={config.split!r}. "
            "Choose among local files with a glob."
        )


# Local files.


def local_files(config: TextData) -> list[Path] | None:
    """The local files of the corpus, sorted by path; None if its name is that of a dataset on the hub.

    Raises:
        CorpusError: if there are no files with a known suffix, or if the config chooses a subset or split.
    """
    path = Path(config.corpus).expanduser()
    has_wildcards = glob.has_magic(config.corpus)
    if not (path.exists() or has_wildcards or path.suffix.lower() in _SUFFIXES or path.is_absolute()):
        return None
    _refuse_hub_options(config)
    if path.is_file():
        matches = [path]
    elif path.is_dir():
        matches = sorted(path.rglob("*"))
    elif has_wildcards:
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    else:
        raise CorpusError(f"corpus {config.corpus!r}: no such file (looked in {Path.cwd()}). {OFFLINE_HINT}")
    files = [f for f in matches if f.suffix.lower() in _SUFFIXES and f.is_file()]
    if not files:
        outcome = f"of {len(matches)} found, none has such a suffix" if matches else "none found"
        raise CorpusError(
            f"corpus {config.corpus!r}: expected {', '.join(_SUFFIXES)} files; {outcome}. "
            f"Check the path, or rename or convert the files. {OFFLINE_HINT}"
        )
    return files


def read_text_file(file: Path) -> Iterator[str]:
    """Yield the exact text of a file as one document, or nothing if the file is empty.

    Raises:
        CorpusError: if it is not UTF-8.
    """
    try:
        # `read_text` would replace "\r\n" by "\n".
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _utf8_error(file, error.object[error.start], error.start) from error
    if text:
        yield text


def _utf8_error(file: Path, byte: int, offset: int) -> CorpusError:
    return CorpusError(
        f"{file}: expected UTF-8, got the byte 0x{byte:02x} at offset {offset}, where it is invalid. "
        "Convert the file (iconv -f ENCODING -t UTF-8), or leave it out of the corpus."
    )


def _documents_of_file(file: Path, config: TextData) -> Iterator[str]:
    if file.stat().st_size == 0:
        return iter(())
    datasets = optional("datasets")
    loader = LOADERS[file.suffix.lower()]

    def rows() -> Iterator[dict[str, Any]]:
        # Without streaming, `datasets` would write a copy of the corpus to its cache below the home folder.
        yield from datasets.load_dataset(loader, data_files=[str(file)], split="train", streaming=True)

    def corpus_error(error: Exception, row: int) -> CorpusError:
        utf8_error = _find_utf8_error(file) if loader == "json" else None
        return utf8_error or CorpusError(
            f"{file}: could not be read as {file.suffix} after {row} rows ({one_line(error)}). Repair the file, "
            "or leave it out of the corpus."
        )

    return _column_texts(rows(), config.column, str(file), corpus_error)


def _find_utf8_error(file: Path) -> CorpusError | None:
    """The error for the first byte that is not UTF-8, or None. The loader knows only its offset in a buffer."""
    offset = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return _utf8_error(file, line[error.start], offset + error.start)
            offset += len(line)
    return None


# Rows, of files and of datasets on the hub.


def _column_texts(
    rows: Iterator[Mapping[str, Any]], column: str, source: str, corpus_error: Callable[[Exception, int], CorpusError]
) -> Iterator[str]:
    """Yield the texts in one column; an exception while reading a row is raised as `corpus_error(exception, row)`."""
    for number in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:  # the loaders raise many types, all of which mean that the row cannot be read
            raise corpus_error(error, number) from error
        if row is None:
            return
        if column not in row:
            raise CorpusError(
                f"{source}, row {number}: {unknown('column', column, row)} Set `column` to the one that holds the text."
            )
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise CorpusError(
                f"{source}, row {number}: expected text in column {column!r}, got {type(text).__name__}. "
                f"Set `column` to one that holds text; the columns are {', '.join(sorted(row))}."
            )
        if text:
            yield text


def _documents_of_hub(config: TextData) -> Iterator[str]:
    datasets, hub = optional("datasets"), optional("huggingface_hub")

    def rows() -> Iterator[dict[str, Any]]:
        try:
            api = hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
            api.dataset_info(config.corpus, timeout=_HUB_TIMEOUT)
        except hub.errors.OfflineModeIsEnabled:
            pass  # the user asked for it, and `load_dataset` may have a copy in its cache
        dataset = datasets.load_dataset(config.corpus, config.subset, split=config.split, streaming=config.streaming)
        if not config.streaming and config.column in dataset.column_names:
            dataset = dataset.select_columns([config.column])
        yield from dataset

    def corpus_error(error: Exception, row: int) -> CorpusError:
        return CorpusError(
            f"corpus {config.corpus!r}: no such file or folder here, and reading it as a dataset on the Hugging Face "
            f"hub (subset={config.subset!r}, split={config.split!r}) failed after {row} rows ({one_line(error)}). "
            f"Check its name and the network. {OFFLINE_HINT} With the environment variable HF_HUB_OFFLINE=1, a "
            "dataset that was downloaded before is read from the cache."
        )

    return _column_texts(rows(), config.column, f"corpus {config.corpus!r}", corpus_error)
