"""Stage 1: rows from files and datasets."""

from mcpo.data.mixture import SourceSpec as SourceSpec
from mcpo.data.mixture import parse_source as parse_source
from mcpo.data.rows import RowOptions as RowOptions
from mcpo.data.rows import RowsReport as RowsReport
from mcpo.data.rows import load_rows as load_rows
