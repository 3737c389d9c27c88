"""``dd-lightning report``: Figure 2 and the tables of finished runs, as a page, Markdown, pictures and JSON."""

from dd_lightning.cli.report.build import report

__all__ = ["report"]
