"""Train a model: python train.py configs/mess3.py [--field value ...]

Fields of the config are overridden by name, as in --optim.lr 3e-4 --model.depth 6; `python train.py CONFIG --help`
lists them all. A run can be stopped with Ctrl-C at any time and goes on with --resume.

The exit status is 0 when the run is finished, 75 when it was stopped and can be resumed, 1 when it failed, and 2 for a
command line that cannot be read.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxwalk.config import ConfigError, TrainConfig

STOPPED = 75
"""The exit status of a run that was stopped and can be resumed: EX_TEMPFAIL, at which schedulers requeue a job."""
RESUME, AGGREGATE = "--resume", "--model.aggregate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to do with the folder of the run."""

    workdir: Path | None = None
    """The folder of the run; by default runs/NAME, with the name of the config."""
    resume: Literal["latest"] | int | None = None
    """Continue from the state saved at this step; --resume alone means the latest."""
    overwrite: bool = False
    """Delete a run that is in the folder."""
    distributed: bool = False
    """This is one of several processes (pods, multi-host)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage(Options):
    """The command line before the config is known."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """A Python file with get_config(), such as configs/mess3.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Options):
    """The command line of one config, whose fields are options too."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(words: list[str] | None = None) -> int:
    """The command line, by default the one of the process. Returns the exit status."""
    words = with_explicit_step(sys.argv[1:] if words is None else words)
    if not words or words[0].startswith("-"):
        tyro.cli(Usage, prog="train.py", description=__doc__, args=words, config=(tyro.conf.FlagCreatePairsOff,))
        print("train.py: expected the config before the options: python train.py CONFIG [OPTIONS]", file=sys.stderr)
        return 2
    try:
        command = parse(*words)
        import jax

        if command.distributed:
            jax.distributed.initialize()
        from jaxwalk._program_cache import enable_program_cache
        from jaxwalk.checkpoint import CheckpointError, Run
        from jaxwalk.training import TrainingDiverged, train
    except (ConfigError, ImportError) as error:
        return report(error)
    enable_program_cache()
    config, resume = command.train, command.resume
    workdir = command.workdir or Path("runs") / config.name
    try:
        train(
            config,
            workdir,
            resume=True if resume == "latest" else False if resume is None else resume,
            overwrite=command.overwrite,
        )
    except (ConfigError, CheckpointError, TrainingDiverged, OSError, ImportError) as error:
        return report(error)
    return 0 if Run(workdir).resolve("latest") == config.steps else STOPPED


def with_explicit_step(words: list[str]) -> list[str]:
    """`words` with "latest" after a --resume without a step."""
    words = list(words)
    for place in [n for n, word in enumerate(words) if word == RESUME][::-1]:
        if not "".join(words[place + 1 : place + 2]).isdigit():
            words.insert(place + 1, "latest")
    return words


def parse(file: str, *options: str) -> Command:
    """The command line of a config file. tyro checks names and types, and exits with a message if one is wrong."""
    path = Path(file)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None or not path.is_file():
        known = ", ".join(sorted(map(str, Path("configs").glob("*.py"))))
        raise ConfigError(f"config: expected a Python file with get_config(), got {file!r}. There are: {known}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file}: expected a function get_config() that returns a TrainConfig, found none.")
    config, remaining = with_aggregate(module.get_config(), options)
    return tyro.cli(
        Command,
        default=Command(train=config),
        args=remaining,
        prog=f"train.py {file}",
        description=module.__doc__,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )


def with_aggregate(config: TrainConfig, options: tuple[str, ...]) -> tuple[TrainConfig, tuple[str, ...]]:
    """`config` with the aggregate of `--model.aggregate NAME`, and the remaining options.

    Several names, separated by commas, are cycled over the layers.
    """
    place = next((n for n, word in enumerate(options) if word.partition("=")[0] == AGGREGATE), None)
    if place is None:
        return config, options
    from jaxwalk import aggregates

    _, equals, names = options[place].partition("=")
    end = place + 1 if equals else place + 2
    chosen: Any = tuple(aggregates.config(n.strip()) for n in (names or "".join(options[place + 1 : end])).split(","))
    model = dataclasses.replace(config.model, aggregate=chosen if len(chosen) > 1 else chosen[0])
    return dataclasses.replace(config, model=model), options[:place] + options[end:]


def report(error: Exception) -> int:
    """Print the message of an error, without a traceback. Returns the exit status."""
    print(f"train.py: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
