"""What a family of pretrained models is, and how its tensors become a Transformer.

A family is one file of this folder with a `FAMILY`: which config keys mean what, and which of its tensors are
which parameters of ours. Nothing is folded or centred: tensors are transposed, concatenated and cut, and cast.
"""

import dataclasses
import functools
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from types import EllipsisType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ConfigError, ModelConfig, unknown
from jaxwalk.model.build import init, resolved_layers
from jaxwalk.model.layout import apart, path_of, stored_paths
from jaxwalk.model.transformer import Transformer
from jaxwalk.sharding import shardings

_TRAINING = "acts in training only"
_GENERATION = "a default of transformers' generate(), which is not used here"
_PYTHON = "says how Python code of transformers is run, or what it returns"
_OTHER_HEADS = "describes heads for other tasks, whose tensors would be refused"
HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(("model_type", "architectures", "auto_map"), "the model type decides, and no foreign code is run"),
    **dict.fromkeys(("_name_or_path", "transformers_version", "transformers.js_config", "_commit_hash"), "a remark"),
    **dict.fromkeys(("unsloth_fixed", "unsloth_version", "is_llama_config"), "a remark"),
    **dict.fromkeys(("torch_dtype", "dtype", "use_bfloat16"), "the tensors have dtypes of their own"),
    **dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states", "torchscript"), _PYTHON),
    **dict.fromkeys(("gradient_checkpointing", "cache_implementation"), _PYTHON),
    **dict.fromkeys(
        ("return_dict", "chunk_size_feed_forward", "_attn_implementation", "_attn_implementation_autoset"), _PYTHON
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"), "ids are data"),
    **dict.fromkeys(("tokenizer_class", "prefix"), "the tokenizer has a file of its own"),
    "pretraining_tp": "how products were split over devices",
    **dict.fromkeys(("initializer_range", "attention_dropout", "hidden_dropout"), _TRAINING),
    **dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"), _TRAINING),
    **dict.fromkeys(
        ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "_num_labels"), _OTHER_HEADS
    ),
    **dict.fromkeys(("task_specific_params", "is_decoder"), _OTHER_HEADS),
    **dict.fromkeys(("max_length", "min_length", "do_sample", "early_stopping", "num_beams"), _GENERATION),
    **dict.fromkeys(("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"), _GENERATION),
    **dict.fromkeys(("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"), _GENERATION),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"), _GENERATION),
    **dict.fromkeys(("output_scores", "return_dict_in_generate", "forced_bos_token_id"), _GENERATION),
    **dict.fromkeys(("forced_eos_token_id", "remove_invalid_values", "suppress_tokens"), _GENERATION),
    **dict.fromkeys(("exponential_decay_length_penalty", "begin_suppress_tokens"), _GENERATION),
}
"""Keys of any config.json that leave the mathematics alone, and why."""

# Keys of any config.json that change the mathematics unless they have this value.
_FIXED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}


class Keys:
    """The keys of a foreign config: those that a family asks for, and what is wrong with them, all at once."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.asked: set[str] = set()
        self.problems: list[str] = []

    def __call__(self, name: str, *default: Any) -> Any:
        """The value of a key; where it is absent or null, `default`, without which it is a problem."""
        self.asked.add(name)
        value = self.given.get(name)
        if value is None and not default:
            self.problems.append(f"{name}: expected a value, got none")
        return default[0] if value is None and default else value

    def expect(self, name: str, value: Any, *same: Any) -> None:
        """A key that must have this one value, or one that means the same, where it is given."""
        if self(name, value) not in (value, *same):
            self.problems.append(f"{name}: expected {value!r}, got {self.given[name]!r}, which is not supported")

    def choose(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """What `choices` make of a key's value."""
        value = self(name, default)
        if value not in choices:
            self.problems.append(f"{name}: expected one of {', '.join(sorted(choices))}, got {value!r}")
        return choices.get(value)

    def nullable(self, name: str, default: Any) -> Any:
        """The value of a key for which null is a value too: `default` only where it is absent."""
        self.asked.add(name)
        return self.given.get(name, default)

    def open(self, name: str) -> None:
        """Make the keys of a part of the config keys of its own, where it has such a part."""
        part = dict(self(name, {}))
        for key, value in part.items():
            if key not in HARMLESS and self.given.get(key, value) != value:
                self.problems.append(f"{key}: expected one value, got {self.given[key]!r} and {value!r} in {name}")
        self.given = {**self.given, **part}
        self.expect_fixed()

    def expect_fixed(self) -> None:
        """Keys of any config.json that change the mathematics unless they have one value."""
        for name, value in _FIXED.items():
            self.expect(name, value)

    def finish(self, harmless: Iterable[str], failure: Exception | None) -> list[str]:
        """All problems, unknown keys among them. A key that is null is not set, whatever it means.

        failure: what stopped the family from asking for the rest, of which nothing is known then.
        """
        if failure is not None:
            return self.problems or [str(failure)]
        known = self.asked | set(harmless)
        rest = sorted(name for name, value in self.given.items() if name not in known and value is not None)
        if rest:
            shown = ", ".join(f"{name} = {self.given[name]!r}" for name in rest)
            self.problems.append(f"keys that could change the mathematics, and that are not known: {shown}")
        return self.problems


class Tensor(NamedTuple):
    """One stored tensor, or some rows of it (outputs of a linear map), that make a parameter of ours or a part of it.

    name: without ".weight" and ".bias" where it is that of a module of ours; "{}" stands for the layer.
    rows: how many there are; several numbers if they are split into blocks: (heads, 3, head_width).
    take: which of them are meant, as an index into the split rows; by default all.
    """

    name: str
    rows: tuple[int, ...] = ()
    take: tuple[int | slice | EllipsisType, ...] = ()

    def taken(self, array: np.ndarray) -> np.ndarray:
        """The rows that are meant of an array that has them first."""
        return (
            array.reshape(*self.rows, *array.shape[1:])[self.take].reshape(-1, *array.shape[1:]) if self.take else array
        )


class Raw(NamedTuple):
    """One stored tensor that is a parameter of ours in another layout, or rows of it, and no linear map's.

    name: whole; "{}" stands for the layer.
    shape: as stored.
    layout: how the numbers lie here, as a view of the stored ones. Several tensors follow along the first axis.
    A family that has any is not exported.
    """

    name: str
    shape: tuple[int, ...]
    layout: Callable[[np.ndarray], np.ndarray] = lambda array: array


def causal_conv1d(name: str, channels: int, taps: int) -> Raw:
    """The weight of a causal Conv1d of PyTorch, each channel for itself, whose last tap is of the position itself."""
    return Raw(f"{name}.weight", (channels, 1, taps), lambda array: array[:, 0, ::-1].T)


Tensors = Mapping[str, str | Tensor | tuple[Tensor, ...] | Raw | tuple[Raw, ...]]
"""Module of ours, "layers/{}/aggregate/qkv", or a parameter of it -> the stored tensors that it is concatenated of.

A path with "{}" is of all layers, and one with a number in its place of that layer. The closest path counts.
"""


class GGUF(NamedTuple):
    """How llama.cpp writes a family: the architecture's name, its metadata as config.json, what it did to tensors.

    config: of the metadata, without the architecture's name before it, and the tensors of the file by their names.
    undo: the tensor of a module, as it is in a safetensors file.
    consumed: the names of tensors that `config` reads, which are no parameters.
    """

    architecture: str
    config: Callable[[Keys, Mapping[str, Any]], dict[str, Any]]
    undo: Callable[[str, np.ndarray, ModelConfig], np.ndarray] = lambda name, array, config: array
    consumed: tuple[str, ...] = ()


class Family(NamedTuple):
    """What is known of a family.

    model_types: those of config.json that it covers.
    config: the model that a config.json describes.
    tensors: where the parameters of such a model are.
    prefix: what names of tensors begin with, unless the model was saved without its head.
    conv1d: linear maps are stored as [in, out], as ours are, not as [out, in].
    harmless: more keys of config.json that leave the mathematics alone, and why.
    ignored: patterns of tensors that are no parameters, and why.
    renamed: patterns of names, and what they are replaced by before anything else: what other kinds of the model, or
        other versions of transformers, call the same tensors.
    describe: config.json of a model, the inverse of `config`, for those families that can be exported. What they
        cannot express is left out; it then comes back otherwise, and is refused.
    """

    model_types: tuple[str, ...]
    config: Callable[[Keys], ModelConfig]
    tensors: Callable[[ModelConfig], Tensors]
    prefix: str = ""
    conv1d: bool = False
    harmless: Mapping[str, str] = {}
    ignored: Mapping[str, str] = {}
    renamed: Mapping[str, str] = {}
    describe: Callable[[ModelConfig], dict[str, Any]] | None = None
    gguf: GGUF | None = None


@runtime_checkable
class Store(Protocol):
    """Tensors on disk."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Those whose dtype cannot be read, and their dtype."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor: a view of the file if it can be, to be copied and let go before the next is read."""
        ...

    def release(self) -> None:
        """Give the memory of what has been read back to the system."""
        ...


class _Renamed:
    """A store by other names of its tensors."""

    def __init__(self, store: Store, renamed: Mapping[str, str], source: object) -> None:
        def name_of(name: str) -> str:
            return functools.reduce(lambda n, pattern: re.sub(pattern, renamed[pattern], n), renamed, name)

        self._store = store
        self._names = {name_of(name): name for name in store.shapes}
        if twice := set(store.shapes) - set(self._names.values()):
            raise CheckpointError(f"{source}: tensors that are there by another name too: {', '.join(sorted(twice))}.")
        self.shapes = {ours: store.shapes[theirs] for ours, theirs in self._names.items()}
        self.refused = {ours: store.refused[t] for ours, t in self._names.items() if t in store.refused}
        self.release = store.release

    def read(self, name: str) -> np.ndarray:
        return self._store.read(self._names[name])


@functools.cache
def families() -> dict[str, Family]:
    """Name of the file -> the family in it."""
    package = importlib.import_module("jaxwalk.pretrained")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"jaxwalk.pretrained.{name}").FAMILY for name in names}


def first_layer(config: ModelConfig) -> tuple[Any, Any]:
    """The aggregate's and the filter's config of a model whose layers are alike."""
    return resolved_layers(dataclasses.replace(config, depth=1))[0]


def family_of(model_type: Any) -> Family:
    """The family of a config.json's model_type. Raises CheckpointError, which lists ours, if there is none."""
    known = {kind: family for family in families().values() for kind in family.model_types}
    if model_type is None:
        raise CheckpointError(
            f"config.json has no model_type: expected one of {', '.join(sorted(known))}. It is not as transformers "
            "writes it. Models of other formats, such as that of mamba_ssm, often have a conversion, in a repository "
            "whose name ends in '-hf': give that."
        )
    if model_type not in known:
        raise CheckpointError(
            f"{unknown('model_type', model_type, known)} A family that is not here is one file in jaxwalk/pretrained/; "
            "no code that comes with a checkpoint is run."
        )
    return known[model_type]


@functools.lru_cache(maxsize=1)
def _template(config: ModelConfig) -> Transformer:
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def read_config(family: Family, given: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes. Raises CheckpointError with everything that is wrong with it."""
    keys = Keys(given)
    keys.expect_fixed()
    failure = None
    try:
        config = family.config(keys)
        _template(config)
    except (ConfigError, TypeError, ValueError, ArithmeticError) as error:  # of values that are problems themselves
        failure = error
    if problems := keys.finish((*HARMLESS, *family.harmless), failure):
        raise CheckpointError(
            f"config.json of {given.get('model_type')!r}: " + "; ".join(problems) + ". Loading it all the same would "
            "give another model. If a key is harmless, remove it from config.json."
        ) from failure
    return config


class _Part(NamedTuple):
    tensor: Tensor | Raw
    name: str
    shape: tuple[int, ...]
    """As stored."""
    rows: int
    """How many are taken."""


class _Parameter(NamedTuple):
    path: str
    shape: tuple[int, ...]
    transposed: bool
    """Ours is the transpose of what has its rows first."""
    conv1d: bool
    """So is what is stored."""
    parts: tuple[_Part, ...]

    def write(self, buffer: np.ndarray, part: _Part, start: int, stored: np.ndarray) -> None:
        """Put a stored tensor at its place in ours, cast."""
        if isinstance(part.tensor, Raw):
            buffer[start : start + part.rows] = part.tensor.layout(stored)
            return
        taken = part.tensor.taken(stored.T if self.conv1d else stored)
        # Cast before transposing: a transposed array is read out of order, which narrow floats make slow.
        taken = taken.astype(buffer.dtype, copy=False)
        own = buffer if len(self.parts) == 1 else buffer[..., start : start + part.rows]
        own[...] = taken.T if self.transposed else taken

    def stored(self, ours: np.ndarray, start: int, part: _Part) -> np.ndarray:
        """The inverse, for parts of which all rows are taken."""
        taken = ours if len(self.parts) == 1 else ours[..., start : start + part.rows]
        return taken.T if self.transposed and not self.conv1d else taken


def parameters(family: Family, config: ModelConfig) -> list[_Parameter]:
    """Every parameter of a model, with the tensors that it is made of."""
    tensors = family.tensors(config)
    found = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(apart(_template(config)))[0]:
        path = path_of(keys)
        layer = path.split("/")[1] if path.startswith("layers/") else ""
        kind = path.rsplit("/", 1)[1]
        named = next((name for name in _names(path) if name in tensors), path)
        where, suffix = tensors[named], f".{'bias' if kind == 'bias' else 'weight'}"
        transposed = kind == "weight" and named != "unembed"
        pieces = (where,) if isinstance(where, str | Tensor | Raw) else where
        parts = []
        for piece in pieces:
            if isinstance(piece, Raw):
                rows = len(piece.layout(np.empty(piece.shape, bool)))
                parts.append(_Part(piece, piece.name.format(layer), piece.shape, rows))
                continue
            tensor = Tensor(piece) if isinstance(piece, str) else piece
            own = leaf.shape[-1] if transposed or leaf.ndim == 1 else leaf.shape[0]
            rows = math.prod(tensor.rows) if tensor.rows else own
            taken = np.empty(tensor.rows, bool)[tensor.take].size if tensor.take else rows
            rest = leaf.shape[:-1] if transposed else leaf.shape[1:]
            shape = (*rest, rows) if transposed and family.conv1d else (rows, *rest)
            parts.append(_Part(tensor, tensor.name.format(layer) + suffix, shape, taken))
        found.append(_Parameter(path, leaf.shape, transposed, transposed and family.conv1d, tuple(parts)))
    return found


def _names(path: str) -> Iterable[str]:
    """The keys of `Tensors` that may mean a parameter, the closest first."""
    general = re.sub(r"^layers/\d+/", "layers/{}/", path)
    for name in (path, general):
        yield name
        yield name.rsplit("/", 1)[0]


def assemble(
    family: Family, config: ModelConfig, store: Store, dtype: Any, mesh: Mesh | None, source: object
) -> Transformer:
    """The model whose tensors are in `store`, one tensor after another, each cast and put where it belongs.

    Raises CheckpointError that names all tensors which are missing, not known, misshapen, or of another dtype.
    """
    plan = parameters(family, config)
    store = _Renamed(store, family.renamed, source) if family.renamed else store
    headless = family.prefix and not any(name.startswith(family.prefix) for name in store.shapes)
    if headless:
        plan = [p._replace(parts=tuple(_headless(part, family.prefix) for part in p.parts)) for p in plan]
    _check(family, config, store, plan, source)

    template = _template(config)
    leaves, structure = jax.tree.flatten(template)
    places = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(template, mesh))
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    by_path = {parameter.path: parameter for parameter in plan}
    arrays = []
    for leaf, place, paths in zip(leaves, places, stored_paths(template), strict=True):
        buffer = _aligned(leaf.shape, dtype)
        # A leaf of stacked layers is filled layer by layer, in place.
        for path, view in zip(paths, buffer if paths[0].startswith("layers/") else [buffer], strict=True):
            parameter, start = by_path[path], 0
            for part in parameter.parts:
                parameter.write(view, part, start, store.read(part.name))
                start += part.rows
            store.release()
        arrays.append(_placed(buffer, place))
    return jax.tree.unflatten(structure, arrays)


def _headless(part: _Part, prefix: str) -> _Part:
    return part._replace(name=part.name.removeprefix(prefix))


def _check(family: Family, config: ModelConfig, store: Store, plan: list[_Parameter], source: object) -> None:
    wanted = {part.name: part.shape for parameter in plan for part in parameter.parts}
    problems = []
    if missing := [name for name in wanted if name not in store.shapes]:
        problems.append(f"missing: {', '.join(missing)}")
    extra = [name for name in store.shapes if name not in wanted]
    extra = [name for name in extra if not any(re.search(pattern, name) for pattern in family.ignored)]
    if config.tied and (head := _tied_copy(family, config, extra)):
        embedding = next(p.parts[0].name for p in plan if p.path == "embed/table")
        if embedding in store.shapes and np.array_equal(store.read(head), store.read(embedding)):
            extra.remove(head)
        store.release()
    if extra:
        problems.append(f"not known: {', '.join(extra)}")
    for name in wanted:
        if name in store.shapes and store.shapes[name] != wanted[name]:
            problems.append(f"{name}: expected shape {list(wanted[name])}, got {list(store.shapes[name])}")
    if wrong := [f"{name} ({store.refused[name]})" for name in wanted if name in store.refused]:
        problems.append(f"of a dtype that is not supported: {', '.join(wrong)}")
    if problems:
        raise CheckpointError(
            f"{source}: its tensors are not those of the model that its config describes. " + "; ".join(problems) + "."
        )


def _tied_copy(family: Family, config: ModelConfig, extra: list[str]) -> str | None:
    # Some files hold the token vectors a second time, as the output vectors that they are tied to.
    head = family.tensors(config).get("unembed")
    return f"{head}.weight" if f"{head}.weight" in extra else None


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # Aligned to 64 bytes, memory becomes an array of JAX on the CPU as it is, without a second copy.
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _placed(buffer: np.ndarray, place: Any) -> jax.Array:
    if place is None:
        return jax.device_put(buffer)
    return jax.make_array_from_callback(buffer.shape, place, lambda index: buffer[index])


def differences(a: Any, b: Any, path: str = "") -> Iterable[str]:
    """The fields in which two configs differ: what each has."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            yield from differences(
                getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}" if path else field.name
            )
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif a != b:
        yield f"{path} would be {b!r}, not {a!r}"
