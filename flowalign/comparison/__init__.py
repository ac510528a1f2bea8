"""`flowalign compare RUN ...`: runs beside each other, as a table for the terminal and one page."""

from __future__ import annotations

from flowalign.comparison.page import render
from flowalign.comparison.runs import Compared, gather
from flowalign.comparison.table import markdown

__all__ = ["Compared", "gather", "markdown", "render"]
