"""The HTML page of a report: one file without links, with charts, tables, a style sheet and a script."""
