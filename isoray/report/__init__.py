"""The HTML report of a run: one self-contained file that opens without a network."""

from __future__ import annotations

from pathlib import Path


def build(run_folder: Path) -> Path:
    """Writes ``report.html`` into a run's folder and returns its path; see :func:`isoray.report.page.build`.

    jinja2 is loaded only when a report is really built. Raises UserError when the folder holds no results.
    """
    from isoray.report import page

    return page.build(Path(run_folder))
