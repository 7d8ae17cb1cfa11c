"""The files of a run: parameters, the definition of the model, its vocabulary or world, and the state to resume from.

A run's folder holds `config.json` (the definition: resolved config, vocabulary, format version), `metrics.jsonl`, and
`checkpoints/` with two series written by Orbax: `state/<step>`, from which training resumes, for the latest steps; and
`parameters/<step>`, a light copy for analysis, for the latest, the best and log-spaced steps and for step 0, the
untrained model. A step of the second series also contains the definition, so it can be copied elsewhere and loaded by
itself. Nothing is pickled: arrays are plain nested dicts with one entry per layer (`layers/7/...`), whether layers were
stacked or unrolled.
"""

import contextlib
import functools
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxwalk import text, worlds
from jaxwalk.config import FORMAT_VERSION, CheckpointConfig, ConfigError, TrainConfig, WorldData, from_dict, to_dict
from jaxwalk.model.build import astype, init
from jaxwalk.model.layout import apart, stacked
from jaxwalk.model.transformer import Transformer
from jaxwalk.sharding import shardings


class CheckpointError(Exception):
    """A checkpoint that is missing or cannot be read. Names the step and what can be loaded instead."""


def to_dicts(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree as plain nested dicts, keyed by the names of their path: {"layers": {"7": {...}}}."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, name = _names(path)
        functools.reduce(lambda d, k: d.setdefault(k, {}), parents, nested)[name] = leaf
    return nested


def from_dicts(template: Any, nested: Mapping[str, Any]) -> Any:
    """The inverse of `to_dicts`: a pytree with the structure of `template` and the leaves of `nested`."""
    leaves = [
        functools.reduce(lambda d, k: d[k], _names(path), nested)
        for path, _ in jax.tree_util.tree_flatten_with_path(template)[0]
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def definition_of(config: TrainConfig, vocabulary: Any, store: text.TokenStore | None = None) -> dict[str, Any]:
    """Everything besides the arrays that is needed to rebuild the model and to know its training data."""
    definition = {"format_version": FORMAT_VERSION, "config": to_dict(config), "vocabulary": vocabulary.to_dict()}
    if store is not None and store.folder is not None:
        definition["store"] = {"folder": str(store.folder.resolve()), "fingerprint": store.fingerprint}
    return definition


def read_definition(file: Path) -> dict[str, Any]:
    """A definition written to `file`. Raises CheckpointError if the file is missing or something else."""
    try:
        definition = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({_first_line(error)}).") from error
    if not isinstance(definition, dict) or not {"format_version", "config", "vocabulary"} <= definition.keys():
        raise CheckpointError(
            f"{file}: expected the definition of a jaxwalk run (format_version, config, vocabulary), got another JSON "
            "file. Point to a folder that train.py made."
        )
    version = definition["format_version"]
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: expected format_version from 1 to {FORMAT_VERSION}, got {version!r}. "
            "It was written by a newer jaxwalk: upgrade."
        )
    return _upgraded(definition)


def _upgraded(definition: dict[str, Any]) -> dict[str, Any]:
    """A definition of an older format in the current format."""
    if definition["format_version"] == 1 and isinstance(definition["config"], dict):
        config = {**definition["config"]}
        if isinstance(config.get("model"), dict):
            # `scan` selected how layers were compiled; they are always stacked now.
            config["model"] = {key: value for key, value in config["model"].items() if key != "scan"}
        config.setdefault("unroll", None)
        definition = {**definition, "config": config}
    return definition


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or none if there is no such file. Lines that a crash damaged are skipped."""
    rows = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # also of bytes that are not UTF-8
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def log_spaced(steps: int, count: int, multiple: int) -> tuple[int, ...]:
    """About `count` steps up to `steps`, evenly spaced in log(step), as multiples of `multiple`; and step 0."""
    ratios = np.geomspace(multiple, max(steps, multiple), count) if count else np.zeros(0)
    return tuple(sorted({0, *(round(r / multiple) * multiple for r in ratios)}))


class Checkpoints:
    """Writes the checkpoints of a run, asynchronously if possible, and restores the state to resume from."""

    def __init__(self, workdir: Path, config: TrainConfig, definition: Mapping[str, Any]) -> None:
        self.folder = workdir.resolve() / "checkpoints"
        self.definition = definition
        retention: CheckpointConfig = config.checkpoint
        self.series = log_spaced(config.steps, retention.log_spaced, config.steps_per_call)
        policy = preservation_policy
        self._state = ocp.CheckpointManager(
            self.folder / "state",
            options=ocp.CheckpointManagerOptions(preservation_policy=policy.LatestN(retention.latest)),
        )
        # An explicit union, since `best_fn` with `max_to_keep` would keep only the best steps and not the latest.
        best = policy.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=retention.best)
        union = [policy.LatestN(retention.latest), policy.CustomSteps(self.series), *([best] if retention.best else [])]
        self._parameters = ocp.CheckpointManager(
            self.folder / "parameters",
            options=ocp.CheckpointManagerOptions(preservation_policy=policy.AnyPreservationPolicy(union)),
        )

    def save(self, step: int, parameters: Any, loss: float, state: Any = None) -> None:
        """Save the parameters of a step with its evaluation loss and, if `state` is given, the state to resume from.

        The arrays may be donated as soon as this returns.
        """
        if step not in self._parameters.all_steps():
            self._parameters.save(
                step,
                args=ocp.args.Composite(
                    parameters=ocp.args.StandardSave(to_dicts(_apart(parameters))),
                    definition=ocp.args.JsonSave({**self.definition, "step": step, "loss": loss}),
                ),
                metrics={"loss": loss},
                force=True,
            )
        if state is not None and step not in self._state.all_steps():
            self._state.save(step, args=ocp.args.StandardSave(to_dicts(_apart(state))), force=True)

    def resume(self, template: Any, step: int | None = None) -> tuple[int, Any, list[int]]:
        """Restore the state to resume training from, and delete later steps, which training will reach again.

        A run that was stopped before its first state was saved resumes from `template` itself, at step 0.

        Args:
            template: a state, whose structure, shapes and shardings the result has.
            step: the step to resume from; the latest by default.

        Returns:
            The step, the state, and the deleted steps.

        Raises:
            CheckpointError: if there is no such state, or it cannot be read. Names the step and the previous one.
        """
        steps = sorted(self._state.all_steps())
        if not steps and not step:
            return 0, template, self._delete_after(-1)
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"step: expected one of the saved states {steps}, got {step}.")
        restored = _read(self.folder / "state" / str(step) / "default", template, step, steps, "--resume")
        return step, restored, self._delete_after(step)

    def _delete_after(self, step: int) -> list[int]:
        deleted = set()
        for manager in (self._state, self._parameters):
            for later in manager.all_steps():
                if later > step:
                    manager.delete(later)
                    deleted.add(later)
        return sorted(deleted)

    def latest(self) -> int | None:
        """The latest step that training can resume from, or None."""
        return self._state.latest_step()

    def close(self) -> None:
        """Wait until everything has been written to disk."""
        for manager in (self._state, self._parameters):
            manager.wait_until_finished()
            manager.close()


@jax.jit
def _apart(tree: Any) -> Any:
    """A copy with layers apart: on CPU, an asynchronous writer would otherwise see the buffers of the next step."""
    return jax.tree.map(jnp.copy, apart(tree))


def _read(folder: Path, template: Any, step: int, steps: Iterable[int], option: str) -> Any:
    """Restore a pytree like `template` (arrays or ShapeDtypeStructs) onto the shardings of its leaves.

    Leaves without a sharding are restored uncommitted to a device: committed ones would make programs compile twice.
    """
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    separate = apart(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding(a)), template))
    targets = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or local), to_dicts(separate)
    )
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            nested = reader.restore(folder.resolve(), args=ocp.args.StandardRestore(targets))
        restored = from_dicts(separate, nested)
        on_host = lambda a, like: a if like.sharding is not None else np.asarray(a)
        restored = stacked(template, jax.tree.map(on_host, restored, separate))
        place = lambda a, like: jnp.asarray(a) if _sharding(like) is None else jax.device_put(a, _sharding(like))
        return jax.tree.map(place, restored, template)
    except Exception as error:  # Orbax and tensorstore raise errors of many types
        earlier, later = [s for s in steps if s < step], [s for s in steps if s > step]
        if earlier:
            remedy = f"The previous one is step {max(earlier)}: {option} {max(earlier)}."
        else:
            remedy = f"The next one is step {min(later)}: {option} {min(later)}." if later else "There is no other."
        raise CheckpointError(
            f"step {step} in {folder} is corrupted or incomplete ({_first_line(error)}). {remedy}"
        ) from error


def _sharding(leaf: Any) -> Any:
    """The sharding of a leaf on a mesh, or None."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


class Run:
    """The folder of a run, opened for reading: its config, vocabulary, world, saved steps and their models.

    It may also be a single step of `checkpoints/parameters`, copied elsewhere. Raises CheckpointError if it is neither.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        single = self.folder / "definition" / "metadata"
        self._single = single.is_file()
        source = single if self._single else self.folder / "config.json"
        if not source.is_file():
            raise CheckpointError(
                f"{self.folder}: expected a run's folder (with config.json) or one of checkpoints/parameters/<step>, "
                f"got {'a folder without them' if self.folder.is_dir() else 'nothing'}. Train with train.py first."
            )
        self.definition = read_definition(source)
        self.config: TrainConfig = from_dict(TrainConfig, self.definition["config"])
        self.vocabulary = text.vocabulary_from_dict(self.definition["vocabulary"])

    @functools.cached_property
    def world(self) -> Any:
        """The world that the run's paths are sampled from, or None for text."""
        data = self.config.data
        return worlds.make(data.world, **data.params) if isinstance(data, WorldData) else None

    @functools.cached_property
    def store(self) -> text.TokenStore | None:
        """The token store that the run was trained on, or None for a world.

        Raises CorpusError if it is gone and cannot be rebuilt, because the corpus is gone or has changed.
        """
        data = self.config.data
        if isinstance(data, WorldData):
            return None
        recorded = self.definition.get("store")
        if recorded is not None and Path(recorded["folder"]).is_dir():
            return text.read_store(recorded["folder"], recorded["fingerprint"])
        store = text.open_store(data)
        if store.vocabulary.to_dict() != self.vocabulary.to_dict() or (
            recorded is not None and store.fingerprint != recorded["fingerprint"]
        ):
            raise text.CorpusError(
                f"{data.corpus}: it is no longer what the run was trained on, and the token store of the run is gone"
                + (f" from {recorded['folder']}" if recorded else "")
                + ". Restore the original corpus."
            )
        return store

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps whose parameters are saved, in order. Incomplete ones are not included."""
        if self._single:
            return (self.definition["step"],)
        folder = self.folder / "checkpoints" / "parameters"
        names = (p.name for p in folder.iterdir()) if folder.is_dir() else ()
        steps = tuple(sorted(int(name) for name in names if name.isdigit()))
        if not steps:
            raise CheckpointError(f"{folder}: no step has been saved yet.")
        return steps

    def loss(self, step: int) -> float:
        """The evaluation loss of a saved step, in nats per token."""
        try:
            return json.loads((self._step_folder(step) / "definition" / "metadata").read_text("utf-8"))["loss"]
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, error) from error

    def resolve(self, step: int | Literal["latest", "best"]) -> int:
        """The number of a saved step given as a number, "latest", or "best" (lowest evaluation loss)."""
        if step == "latest":
            return self.steps[-1]
        if step == "best":
            losses = {}
            for saved in self.steps:
                with contextlib.suppress(CheckpointError):  # a damaged step cannot be the best
                    losses[saved] = self.loss(saved)
            return min(losses, key=losses.__getitem__) if losses else self.steps[-1]
        if step not in self.steps:
            raise CheckpointError(
                f"step: expected one of {', '.join(map(str, self.steps))}, 'best' or 'latest', got {step}."
            )
        return step

    def model(self, step: int | Literal["latest", "best"] = "latest", mesh: Mesh | None = None) -> Transformer:
        """The float32 model of a saved step, on one device or sharded over a mesh."""
        step = self.resolve(step)
        template = jax.eval_shape(lambda: init(self.config.model, jax.random.key(0)))
        if mesh is not None:
            place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
            template = jax.tree.map(place, template, shardings(template, mesh))
        return _read(self._step_folder(step) / "parameters", template, step, self.steps, "--step")

    def _step_folder(self, step: int) -> Path:
        return self.folder if self._single else self.folder / "checkpoints" / "parameters" / str(step)

    def _damaged(self, step: int, error: Exception) -> CheckpointError:
        others = [s for s in self.steps if s != step]
        return CheckpointError(
            f"step {step} in {self._step_folder(step)} is corrupted or incomplete ({_first_line(error)}). "
            f"Other steps: {', '.join(map(str, others)) or 'none'}. Remove its folder, or ask for another with --step."
        )


def load(
    source: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    *,
    step: int | Literal["latest", "best"] = "latest",
) -> tuple[Transformer, Any]:
    """The model and vocabulary of a run's folder, or of a single step copied from it.

    `jaxwalk.load` does the same and also loads pretrained models.

    Args:
        source: the folder.
        dtype: the dtype of parameters and computation.
        mesh: devices to place the parameters on.
        step: a saved step, the latest, or the best by evaluation loss.

    Returns:
        `model, vocabulary`.

    Raises:
        CheckpointError: if there is no such run or step, or it cannot be read. Names the previous step.
    """
    run = Run(source)
    return astype(run.model(step, mesh), dtype), run.vocabulary


LOCK, OWNER = ".lock", ".owner"
"""Files in the folder of a run that is being trained: what is locked, and which process has locked it."""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Within the block, no other process may train in this folder. The lock of a process that is killed is released.

    Raises:
        ConfigError: if another process trains in it. Names the process.
    """
    there = workdir.is_dir()
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        owner = workdir / OWNER
        holder = owner.read_text("utf-8") if owner.is_file() else "another process"
        raise ConfigError(
            f"{workdir}: {holder} is training in this folder. Wait until it is done, stop it, or use another --workdir."
        ) from None
    try:
        (workdir / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        (workdir / OWNER).unlink(missing_ok=True)
        lock.release()
        if not there and not (workdir / "config.json").exists():  # a run that was refused leaves nothing behind
            (workdir / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                workdir.rmdir()


def prepare_workdir(workdir: Path, definition: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Create a run's folder, or check that it holds this run. Raises ConfigError rather than lose any data."""
    file, partial = workdir / "config.json", workdir / "config.json.tmp"
    if overwrite and resume:
        raise ConfigError("--overwrite deletes the run that --resume would continue: choose one of them.")
    if overwrite and file.exists():
        read_definition(file)  # raises unless this is a run: nothing else is deleted
        for entry in workdir.iterdir():
            if entry.name not in (LOCK, OWNER):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not file.exists() and resume:
        _restore_config(workdir)
    if not file.exists():
        others = workdir.iterdir() if workdir.is_dir() else ()
        if any(entry.name not in (LOCK, OWNER, partial.name) for entry in others):
            raise ConfigError(
                f"{workdir}: expected a run's folder or an empty one, got other files in it. Use another --workdir."
            )
        if resume:
            raise ConfigError(f"{workdir}: expected a run to resume, got no config.json. Start it without --resume.")
        workdir.mkdir(parents=True, exist_ok=True)
    else:
        old = read_definition(file)
        if "store" not in old:  # older runs did not record their store
            definition = {key: value for key, value in definition.items() if key != "store"}
        if changed := sorted(_differences(_fixed_settings(old), _fixed_settings(definition))):
            raise ConfigError(
                f"{workdir} holds another config's run; they differ in {', '.join(changed)}. "
                "Use another --workdir, or --overwrite to delete that run."
            )
        if not resume:
            raise ConfigError(
                f"{workdir} already holds this run. Use --resume to continue it, or --overwrite to start over."
            )
    partial.write_text(json.dumps(definition, indent=2) + "\n", "utf-8")
    os.replace(partial, file)


def _restore_config(workdir: Path) -> None:
    """Write the config.json of a run that has lost it, from the definition that each of its steps has."""
    steps = [int(f.name) for f in (workdir / "checkpoints" / "parameters").glob("*") if f.name.isdigit()]
    for step in sorted(steps, reverse=True):
        source = workdir / "checkpoints" / "parameters" / str(step) / "definition" / "metadata"
        with contextlib.suppress(CheckpointError):
            definition = read_definition(source)
            kept = {
                key: definition[key] for key in ("format_version", "config", "vocabulary", "store") if key in definition
            }
            (workdir / "config.json").write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
            return


# Settings that may change when a run is resumed, since they do not affect the trained parameters.
_CHANGEABLE = ("name", "log_every", "eval_every", "eval_batches", "sample_every", "checkpoint", "mesh")


def _fixed_settings(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a definition that may not change when a run is resumed."""
    config = {k: v for k, v in definition["config"].items() if k not in _CHANGEABLE}
    config["data"] = {k: v for k, v in config["data"].items() if k != "store"}
    store = definition.get("store") or {}
    return {**config, "vocabulary": definition["vocabulary"], "corpus": store.get("fingerprint")}


def _differences(a: Any, b: Any, path: str = "") -> Iterable[str]:
    """The paths of the entries in which two nested mappings differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {*a, *b}:
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif a != b:
        yield path
