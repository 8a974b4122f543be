"""The page of a recipe that has none of its own: its metrics and tables as they are."""

from __future__ import annotations

from markupsafe import Markup

from isoray.report.page import Content, RunFiles, Section, render

MAX_ROWS = 200


def content(run: RunFiles) -> Content:
    """Metrics and the first rows of every table."""
    sections = []
    if run.metrics:
        sections.append(Section("metrics", "Metrics", render("plain_metrics.html.j2", metrics=run.metrics)))
    tables = run.results.get("tables")
    for name in tables if isinstance(tables, dict) else ():
        rows = run.table(name)
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            body = render("plain_table.html.j2", columns=columns, rows=rows[:MAX_ROWS], total=len(rows))
            sections.append(Section(f"table-{len(sections)}", str(name), body))
    recipe = str(run.results.get("recipe", "unknown"))
    about = Markup("What the run in <code>{}</code> measured.").format(run.folder.name)
    return Content(f"Results of the recipe {recipe}", about, [], sections)
