"""Analyse a trained model, a pretrained one, or put runs side by side:

    python analyze.py runs/mess3 --only proximity,narrowing --prompt "A B A"
    python analyze.py HuggingFaceTB/SmolLM2-135M --prompt "Once upon" --text notes.txt
    python analyze.py compare runs/mess3 runs/rrxor
    python analyze.py seeds runs/a runs/b runs/c
    python analyze.py list

What is decided about each claim is printed, with the number that decides it and the null that it is held against. All
numbers are written to the run's folder: analysis/report.html (one page, needs no network), findings.json, arrays/*.npz
and figures/*.png, *.svg. For a pretrained model the folder is analysis/NAME here. `seeds` decides the claims over
several trainings of one config, which have been analysed. `list` prints the analyses and their options, each of which
is set by --set ANALYSIS.OPTION=VALUE.
"""

import contextlib
import dataclasses
import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

CONFIG = (tyro.conf.FlagCreatePairsOff,)


class UsageError(Exception):
    """An option whose value the command line does not accept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The command line of an analysis."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """The folder of a run, or one step copied from its checkpoints/parameters; or a pretrained model: a folder, a file
    (.safetensors, .gguf), or a repository on the Hugging Face hub."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best|latest|all")] = "latest"
    """Which of the saved steps."""
    only: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Run these analyses only."""
    claim: Annotated[str | None, tyro.conf.arg(metavar="C2,C5")] = None
    """Run only the analyses that measure these claims."""
    seed: int = 0
    """Of the paths that are drawn, and of all random nulls."""
    verbose: bool = False
    """Print every number, and why analyses were not run."""
    scalars: Annotated[str | None, tyro.conf.arg(metavar="A.X,B.Y")] = None
    """The numbers that training_walk follows, as analysis.number."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="A.OPTION=VALUE")] = ()
    """An option of an analysis; may be repeated."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A path to look at, in symbols of the model's vocabulary."""
    text: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A text to look at, in place of a run's own data."""
    length: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """The length of the pieces that the text is cut into."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write; by default RUN/analysis (RUN/analysis/STEP for all), or analysis/NAME for a pretrained model."""

    def options(self) -> dict[str, dict[str, object]]:
        """The options of each analysis, by its name."""
        options: dict[str, dict[str, object]] = {}
        if self.scalars:
            options["training_walk"] = {"scalars": split(self.scalars)}
        for setting in self.set:
            place, equals, value = setting.partition("=")
            name, dot, option = place.strip().partition(".")
            if not equals or not dot:
                raise UsageError(f"--set: expected ANALYSIS.OPTION=VALUE, got {setting!r}")
            options.setdefault(name, {})[option] = parse_value(value)
        return options

    def names(self) -> tuple[str, ...] | None:
        """The analyses to run; None for all of them."""
        from jaxwalk.analyses import testing

        if self.only and self.claim:
            raise UsageError("--claim: expected either --only or --claim, got both")
        if self.claim:
            return testing(split(self.claim))
        return split(self.only) if self.only else None

    def steps(self) -> list[int | str]:
        """The steps to analyse."""
        if self.step.isdigit():
            return [int(self.step)]
        if self.step != "all":
            return [self.step]
        from jaxwalk import pretrained
        from jaxwalk.checkpoint import Run

        foreign = pretrained.is_foreign(self.source)
        steps: list[int | str] = [*(pretrained.series(self.source) if foreign else Run(self.source).steps)]
        if not steps:
            raise UsageError(f"--step: expected a run or a series of steps, got {self.source}, one model.")
        return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Runs side by side: what they are, how they learned, and what analyze.py found in each."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """The folders of two or more runs."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write; by default the folder `comparison` beside the first run."""


def main(words: list[str] | None = None) -> int:
    """The command line, by default the one of the process. Returns the exit status."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["compare"]:
        return compare(tyro.cli(Compare, prog="analyze.py compare", args=words[1:], config=CONFIG))
    if words[:1] == ["seeds"]:
        return across_seeds(words[1:])
    if words == ["list"]:
        return list_analyses()
    command = tyro.cli(Command, prog="analyze.py", description=__doc__, args=words, config=CONFIG)
    if command.step not in ("best", "latest", "all") and not command.step.isdigit():
        return fail(f"--step: expected a number, best, latest or all, got {command.step!r}", 2)
    try:
        options = command.options()
    except UsageError as error:
        return fail(error, 2)

    from jaxwalk._program_cache import enable_program_cache
    from jaxwalk.analyses import open_subject
    from jaxwalk.checkpoint import CheckpointError
    from jaxwalk.config import ConfigError

    enable_program_cache()
    complete = True
    try:
        for step in command.steps():
            try:
                subject = open_subject(command.source, step, command.prompt, corpus=command.text, length=command.length)
            except CheckpointError as error:
                if command.step != "all":
                    raise
                complete = False  # a damaged step does not prevent the analysis of the others
                fail(error)
                continue
            default = subject.workdir / "analysis" if subject.workdir else Path("analysis", subject.name)
            out = command.out or default
            out = out / str(step) if command.step == "all" else out
            subject = dataclasses.replace(subject, seed=command.seed)
            complete &= analyse(subject, command.names(), options, out, verbose=command.verbose)
    except (UsageError, ConfigError, CheckpointError, ValueError, OSError) as error:
        return fail(error)
    return 0 if complete else 1


def analyse(
    subject: Any,
    only: tuple[str, ...] | None,
    options: Mapping[str, Mapping[str, object]],
    out: Path,
    *,
    verbose: bool = False,
) -> bool:
    """Run the analyses, print what they decide and write the report. Returns whether none of them failed."""
    from jaxwalk import analyses, report

    failures = []

    def failed(name: str, error: Exception) -> None:
        failures.append(name)
        print(f"\nanalyze.py: {name} broke, which is a bug:", file=sys.stderr)
        traceback.print_exception(error)

    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is an error before the work, not after it
    with progress(len(only or analyses.names())) as started:
        findings, skipped = analyses.run(subject, only, started, failed, options)
    shown = (report.table if verbose else report.scores)(findings, skipped)
    if not findings:  # an earlier report in the folder stays as it is
        print(report.table(findings, skipped))
        print("\nnothing written: no analysis could be run")
        return False
    written = report.write(
        findings,
        skipped,
        out,
        title=subject.title,
        facts=subject.facts(),
        training=subject.metrics(),
        seed=subject.seed,
    )
    if verbose:
        shown = f"{report.scores(findings, skipped)}\n\n{shown}"
    print(shown)
    for notice in written.notices:
        print(notice)
    print(f"\nwritten: {written.paths.get('report.html', out)}")
    return not failures


@contextlib.contextmanager
def progress(count: int) -> Iterator[Callable[[str], None]]:
    """Shows how far the analyses are, on a terminal. Yields what is to be called with the name of each as it starts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from jaxwalk.evidence import engine

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        analyses, paths = bar.add_task("analyses", total=count), bar.add_task("", total=None)

        def started(name: str) -> None:
            bar.advance(analyses, bar.tasks[paths].description != "")
            bar.update(paths, description=name, completed=0, total=None)

        with engine.reporting(lambda done, total: bar.update(paths, completed=done, total=total)):
            yield started


def across_seeds(folders: list[str]) -> int:
    """Print what several analysed runs of one config decide together. Returns the exit status."""
    from jaxwalk import report
    from jaxwalk.checkpoint import CheckpointError
    from jaxwalk.config import ConfigError
    from jaxwalk.evidence import seeds

    try:
        findings = seeds.across_seeds(folders)
    except (ConfigError, CheckpointError, OSError) as error:
        return fail(error)
    print(report.scores(findings))
    return 0


def list_analyses() -> int:
    """Print the analyses with their claims and options. Returns the exit status."""
    from jaxwalk import analyses

    for name in analyses.names():
        about = analyses.describe(name)
        print(f"{name} ({', '.join(about.claims) or 'any claim'})")
        print(textwrap.fill(about.summary, 100, initial_indent="    ", subsequent_indent="    "))
        for option, default in about.options.items():
            print(f"        --set {name}.{option}={default}")
    return 0


def compare(command: Compare) -> int:
    """Compare runs, print the table and write the page. Returns the exit status."""
    from jaxwalk import comparison, report
    from jaxwalk.checkpoint import CheckpointError
    from jaxwalk.config import ConfigError

    if not command.runs:
        return fail("compare: expected the folders of two or more runs", 2)
    out = command.out or command.runs[0].resolve().parent / "comparison"
    try:
        compared = comparison.compare(command.runs)
        written = report.write_comparison(compared, out)
    except (ConfigError, CheckpointError, OSError) as error:
        return fail(error)
    print(report.comparison_table(compared))
    for notice in written.notices:
        print(notice)
    print(f"\nwritten: {written.paths.get('compare.html', out)}")
    return 0


def split(names: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in names.split(","))


def parse_value(text: str) -> object:
    """A value as JSON (64, true, null, [1, 2]), or as text where it is not JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def fail(error: object, status: int = 1) -> int:
    """Print the message of an error, without a traceback. Returns the exit status."""
    print(f"analyze.py: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
