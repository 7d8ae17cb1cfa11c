"""Analyse a trained model: python analyze.py runs/mess3 [--only proximity,narrowing] [--prompt "A B A"]
A pretrained one:       python analyze.py HuggingFaceTB/SmolLM2-135M --prompt "Once upon" --text notes.txt
Put runs side by side:  python analyze.py compare runs/mess3 runs/rrxor

Every finding is printed beside its null or exact reference, and written to the run's folder: analysis/report.html
(one page, needs no network), findings.json, arrays/*.npz and figures/*.png, *.svg. For a pretrained model the folder is
analysis/NAME here.
"""

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> int:
    """The command line. Returns the exit status."""
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "source",
        help="a run's folder, or one step copied from its checkpoints/parameters; or a pretrained model: a folder, a "
        ".safetensors or .gguf file, a repository on the Hugging Face hub",
    )
    parser.add_argument("--step", default="latest", help="a kept step's number, best, latest (default), or all")
    parser.add_argument("--only", metavar="A,B", help="run these analyses only")
    parser.add_argument(
        "--scalars", metavar="A.X,B.Y", help="the numbers that training_walk follows, as analysis.number"
    )
    parser.add_argument(
        "--set", metavar="A.OPTION=VALUE", action="append", default=[], help="an option of an analysis; may be repeated"
    )
    parser.add_argument("--prompt", help="a path to look at, in symbols of the model's vocabulary")
    parser.add_argument("--text", metavar="FILE", help="a text to look at, in place of a run's own data")
    parser.add_argument("--length", type=int, help="of the pieces that the text is cut in, in tokens")
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write; by default RUN/analysis (RUN/analysis/STEP for all); of a pretrained one analysis/NAME",
    )
    arguments = parser.parse_args()
    only = [name.strip() for name in arguments.only.split(",")] if arguments.only else None
    if arguments.step not in ("best", "latest", "all") and not arguments.step.isdigit():
        parser.error(f"--step: expected a number, best, latest or all, got {arguments.step!r}")

    from jaxwalk import analyses, pretrained
    from jaxwalk.checkpoint import CheckpointError, Run
    from jaxwalk.config import ConfigError

    options: dict[str, dict[str, object]] = {}
    if arguments.scalars:
        scalars = tuple(name.strip() for name in arguments.scalars.split(","))
        options["training_walk"] = {"scalars": scalars}
    for setting in arguments.set:
        where, equals, value = setting.partition("=")
        name, dot, option = where.strip().partition(".")
        if not equals or not dot:
            parser.error(f"--set: expected ANALYSIS.OPTION=VALUE, got {setting!r}")
        options.setdefault(name, {})[option] = parsed(value)
    whole = True
    try:
        if arguments.step == "all":
            foreign = pretrained.is_foreign(arguments.source)
            steps: list[int | str] = [
                *(pretrained.series(arguments.source) if foreign else Run(arguments.source).steps)
            ]
            if not steps:
                raise ConfigError(f"--step: expected a run or a series of steps, got {arguments.source}, one model.")
        else:
            steps = [int(arguments.step) if arguments.step.isdigit() else arguments.step]
        for step in steps:
            try:
                subject = analyses.open_subject(
                    arguments.source, step, arguments.prompt, corpus=arguments.text, length=arguments.length
                )
            except CheckpointError as error:  # of all steps, one that is damaged costs itself
                if arguments.step != "all":
                    raise
                whole = False
                print(f"analyze.py: {error}", file=sys.stderr)
                continue
            out = arguments.out or (subject.workdir / "analysis" if subject.workdir else Path("analysis", subject.name))
            whole &= analyse(subject, only, options, out / str(step) if arguments.step == "all" else out)
    except (ConfigError, CheckpointError, ValueError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 1
    return 0 if whole else 1


def compare(arguments: list[str]) -> int:
    """The command line of `compare`. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="analyze.py compare",
        description="Runs side by side: what they are, how they learned, and what analyze.py found in each.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="two or more runs' folders")
    parser.add_argument("--out", type=Path, help="where to write; by default the folder `comparison` beside the first")
    chosen = parser.parse_args(arguments)
    out = chosen.out or chosen.runs[0].resolve().parent / "comparison"

    from jaxwalk import comparison, report
    from jaxwalk.checkpoint import CheckpointError
    from jaxwalk.config import ConfigError

    try:
        compared = comparison.compare(chosen.runs)
        written = report.write_comparison(compared, out)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 1
    print(report.comparison_table(compared))
    for notice in written.notices:
        print(notice)
    print(f"\nwritten: {written.paths.get('compare.html', out)}")
    return 0


def parsed(value: str) -> object:
    """A value as JSON, where it is any, else as text: 64, true, null, [1, 2], words.json."""
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return value
    return tuple(found) if isinstance(found, list) else found


def analyse(subject: Any, only: list[str] | None, options: dict[str, dict[str, object]], out: Path) -> bool:
    """Run the analyses on a subject, print the table and write the report. Returns whether none of them broke."""
    from jaxwalk import analyses, report

    def started(name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{name} ...", end="", file=sys.stderr, flush=True)

    broken = []

    def failed(name: str, error: Exception) -> None:
        broken.append(name)
        print(f"\nanalyze.py: {name} broke, which is a bug:", file=sys.stderr)
        traceback.print_exception(error)

    out.mkdir(parents=True, exist_ok=True)  # before the work, not after it, is when to learn that it cannot be
    findings, skipped = analyses.run(subject, only, started, failed, options)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if not findings:  # and a report that is there already stays
        print(report.table(findings, skipped))
        print("\nnothing written: no analysis could be run")
        return False
    written = report.write(
        findings, skipped, out, title=subject.title, facts=subject.facts(), training=subject.metrics()
    )
    print(report.table(findings, skipped))
    for notice in written.notices:
        print(notice)
    print(f"\nwritten: {written.paths.get('report.html', out)}")
    return not broken


if __name__ == "__main__":
    sys.exit(main())
