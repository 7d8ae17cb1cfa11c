"""Train a model: python train.py configs/mess3.py [--field value ...]

Fields of the config are overridden by name, as in --optim.lr 3e-4 --model.depth 6; `python train.py CONFIG --help`
lists them all. A run can be stopped with Ctrl-C at any time and goes on with --resume.
"""

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="a Python file with get_config(), such as configs/mess3.py")
    parser.add_argument("--workdir", type=Path, help="the run's folder; by default runs/NAME, from the config")
    parser.add_argument("--resume", nargs="?", type=int, const=True, default=False, metavar="STEP",
                        help="go on from the latest saved state, or from the one of STEP")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="delete a run that is in the folder")
    parser.add_argument("--distributed", action="store_true", help="one of several processes (pods, multi-host)")
    from jaxwalk.config import ConfigError

    help_on_config = len(sys.argv) > 2 and not sys.argv[1].startswith("-") and {"-h", "--help"} & set(sys.argv[2:])
    try:
        if help_on_config:
            load_config(sys.argv[1], ["--help"])
        arguments, overrides = parser.parse_known_args()
        config = load_config(arguments.config, overrides)
        import jax

        if arguments.distributed:
            jax.distributed.initialize()
        from jaxwalk.checkpoint import CheckpointError
        from jaxwalk.training import TrainingDiverged, train
    except (ConfigError, ImportError) as error:
        return fail(error)
    try:
        train(
            config,
            arguments.workdir or Path("runs") / config.name,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
        )
    except (ConfigError, CheckpointError, TrainingDiverged, OSError, ImportError) as error:
        return fail(error)
    return 0


def load_config(file: str, overrides: list[str]):
    """The TrainConfig of a config file, with overrides. Fields and types are checked by tyro, with did-you-mean."""
    import tyro

    from jaxwalk.config import ConfigError, TrainConfig

    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        known = ", ".join(sorted(map(str, Path("configs").glob("*.py"))))
        raise ConfigError(f"config: expected a Python file with get_config(), got {file!r}. There are: {known}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file}: expected a function get_config() that returns a TrainConfig, found none.")
    default, overrides = with_aggregate(module.get_config(), overrides)
    return tyro.cli(
        TrainConfig,
        default=default,
        args=overrides,
        prog=f"train.py {file}",
        description=module.__doc__,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


def with_aggregate(config, overrides: list[str]):
    """`config` with the aggregate of `--model.aggregate NAME`, and the overrides that are left.

    Several names, with commas between them, are cycled over the layers.
    """
    option = "--model.aggregate"
    at = next((i for i, word in enumerate(overrides) if word == option or word.startswith(option + "=")), None)
    if at is None:
        return config, overrides
    from jaxwalk import aggregates

    end = at + 1 if "=" in overrides[at] else at + 2
    names = overrides[at].partition("=")[2] or "".join(overrides[at + 1 : end])
    chosen = tuple(aggregates.config(name.strip()) for name in names.split(","))
    model = dataclasses.replace(config.model, aggregate=chosen if len(chosen) > 1 else chosen[0])
    return dataclasses.replace(config, model=model), overrides[:at] + overrides[end:]


def fail(error: Exception) -> int:
    """Say what is wrong, without a traceback."""
    print(f"train.py: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
