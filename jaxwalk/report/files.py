"""The files of a report, written into one folder: JSON, arrays, figures and the page."""

import contextlib
import functools
import json
import os
import platform
import subprocess
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxwalk.evidence.finding import Comparison, Finding
from jaxwalk.report import _paper
from jaxwalk.report._layout import Layout
from jaxwalk.report._plots import FigureData, Plot, prepare_plots, training_figures
from jaxwalk.report._text import json_data, unique_file_names
from jaxwalk.report.page import comparison_page, report_page

INSTALL = "pip install 'jaxwalk[report]'"
"""The command that installs the plotting libraries, for notices that one is missing."""


class Written(NamedTuple):
    """The files of a report.

    Attributes:
        paths: the files that were written, by their path within the folder ("figures/x.png").
        notices: what could not be written or drawn and why, a sentence each.
    """

    paths: dict[str, Path]
    notices: tuple[str, ...]


def write(
    findings: Iterable[Finding],
    skipped: Mapping[str, str],
    folder: str | Path,
    *,
    title: str,
    facts: Mapping[str, object] | None = None,
    training: Iterable[Mapping[str, Any]] = (),
    seed: int | None = None,
) -> Written:
    """Write `findings.json`, `arrays/*.npz`, `figures/*.png` and `.svg`, and `report.html` into `folder`.

    A figure that cannot be drawn, or a missing plotting library, does not affect other files: they are written, and a
    notice says what is missing and why. Files are replaced atomically.

    Args:
        findings: the findings.
        skipped: why each analysis that was not run was skipped, by its name.
        folder: created if it does not exist.
        title: the title of the run.
        facts: what the page says about the run: its config, step, number of parameters, data.
        training: the rows of the run's `metrics.jsonl`, drawn as curves of the loss.
        seed: of the paths that were drawn, as part of what `findings.json` says of how it was produced.

    Raises:
        OSError: if a file cannot be written.
    """
    findings, output = tuple(findings), _ReportFolder(Path(folder))
    produced_by = provenance(seed)
    output.write_json("findings.json", [json_data(f.to_dict() | {"produced_by": produced_by}) for f in findings])
    for finding, name in zip(findings, unique_file_names((f.name, "finding") for f in findings), strict=True):
        if finding.arrays:
            output.write_arrays(name, finding.arrays)
    figures = [FigureData(f, figure, f.arrays) for f in findings for figure in f.figures]
    plots = prepare_plots([*figures, *training_figures(training)])
    output.write_figures(plots)
    output.write_page(
        "report.html",
        lambda notices: report_page(findings, skipped, plots, title=title, facts=facts or {}, notices=notices),
    )
    return Written(output.paths, tuple(output.notices))


def write_comparison(compared: Comparison, folder: str | Path, *, title: str = "runs side by side") -> Written:
    """Write `comparison.json`, `arrays/comparison.npz`, `figures/` and `compare.html` into `folder`.

    Args:
        compared: the comparison, from `jaxwalk.comparison.compare`.
        folder: created if it does not exist.
        title: the title of the page.

    Raises:
        OSError: if a file cannot be written.
    """
    output = _ReportFolder(Path(folder))
    sections = [
        {
            "name": section.name,
            "claim": section.claim,
            "rows": [
                {
                    "name": row.name,
                    "against": row.against,
                    "values": [cell.value for cell in row.cells],
                    "intervals": [cell.interval for cell in row.cells],
                }
                for row in section.rows
            ],
        }
        for section in compared.sections
    ]
    content = {"runs": compared.names, "notes": compared.notes, "sections": sections}
    output.write_json("comparison.json", json_data(content))
    if compared.arrays:
        output.write_arrays("comparison", compared.arrays)
    plots = prepare_plots([FigureData(None, figure, compared.arrays) for figure in compared.figures])
    output.write_figures(plots)
    output.write_page("compare.html", lambda _: comparison_page(compared, plots, title))
    return Written(output.paths, tuple(output.notices))


SCHEMA = 2
"""The version of the format of `findings.json`."""


def provenance(seed: int | None) -> dict[str, Any]:
    """What a finding depends on beside the model and its data: versions, commit, device, precision and seed."""
    import jax

    from jaxwalk import __version__
    from jaxwalk.evidence.engine import PRECISION

    return {
        "schema": SCHEMA,
        "jaxwalk": __version__,
        "commit": _commit(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "precision": PRECISION,
        "seed": seed,
    }


def _commit() -> str | None:
    """The commit of the source tree that this package is run from; None for an installed package."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class _ReportFolder:
    """Writes the files of a report, and records `paths` and `notices` for `Written`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}
        self.notices: list[str] = []

    def write_json(self, name: str, data: Any) -> None:
        """Write strict JSON."""
        with _replacing(self.folder / name) as draft:
            draft.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        self.paths[name] = self.folder / name

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write `arrays/{name}.npz`."""
        file = f"arrays/{name}.npz"
        self._attempt(file, [file], lambda: _write_npz(self.folder / file, arrays))

    def write_figures(self, plots: Sequence[Plot]) -> None:
        """Write each figure that has a layout as PNG and SVG."""
        for plot in plots:
            if plot.problem:
                self.notices.append(f"figure {plot.file_name} of {plot.data.owner}: not drawn, {plot.problem}")
        drawable = [(plot, plot.layout) for plot in plots if plot.layout is not None]
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            if drawable:
                self.notices.append(f"figures (PNG, SVG): not drawn, {error}. To have them: {INSTALL}")
            return
        for plot, layout in drawable:
            name = f"figures/{plot.file_name}"
            files = {f"{name}.{file_format}": file_format for file_format in _paper.FORMATS}
            self._attempt(name, files, functools.partial(self._write_images, layout, files))

    def _write_images(self, layout: Layout, files: Mapping[str, str]) -> None:
        """Draw a figure once, and write it to each file in its format."""
        canvas = _paper.draw(layout)
        for file, file_format in files.items():
            with _replacing(self.folder / file) as draft:
                _paper.save(canvas, draft, file_format)

    def write_page(self, name: str, page: Callable[[Sequence[str]], str]) -> None:
        """Write the HTML document that `page` returns for the notices."""

        def write_html() -> None:
            content = page(self.notices).encode()
            with _replacing(self.folder / name) as draft:
                draft.write_bytes(content)

        self._attempt(name, [name], write_html)

    def _attempt(self, subject: str, files: Iterable[str], action: Callable[[], None]) -> None:
        """Run `action`, which writes `files`. An error becomes a notice, except an OSError, which is raised."""
        try:
            action()
        except ImportError as error:
            self.notices.append(f"{subject}: not drawn, {error}. To have it: {INSTALL}")
        except OSError:
            raise
        except Exception as error:
            self.notices.append(f"{subject}: not drawn, {type(error).__name__}: {error}")
        else:
            self.paths.update((file, self.folder / file) for file in files)


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz that loads without pickle: objects as strings, types that NumPy lacks (bfloat16) as float32."""
    with _replacing(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            value = np.asarray(value)
            if value.dtype.kind == "O":
                value = value.astype(str)
            elif value.dtype.kind == "V" and not value.dtype.names:
                value = value.astype(np.float32)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` if the block succeeds and is removed if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
