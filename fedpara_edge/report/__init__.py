"""Reports on a run: a page with tables and figures, single figures, and all measurements as rows.

`summarizing` defines the numbers. Figures need matplotlib, of the extra `report`; without it the report has its tables
and says so.
"""

from __future__ import annotations

from fedpara_edge.report.rows import read_metrics, to_csv
from fedpara_edge.report.writing import REPORT, Report, write_figure, write_report

__all__ = ["REPORT", "Report", "read_metrics", "to_csv", "write_figure", "write_report"]
