"""One self-contained HTML page that shows a run: built from the records and images in its folder alone."""

from spectralnorm.report.build import build_report

__all__ = ["build_report"]
