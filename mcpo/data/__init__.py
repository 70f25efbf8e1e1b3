"""Stage 1: rows from files and datasets."""
