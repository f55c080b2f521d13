"""Reports that people read: tables, pages, and what a comparison needs of a run."""

from twoview.report.compare import compare, comparison_tables
from twoview.report.files import keep_evidence, keep_predictions
from twoview.report.pages import write_pages
from twoview.report.pictures import picture_of_views
from twoview.report.tables import show, tables

__all__ = [
    "compare",
    "comparison_tables",
    "keep_evidence",
    "keep_predictions",
    "picture_of_views",
    "show",
    "tables",
    "write_pages",
]
