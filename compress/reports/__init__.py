"""Records for people: terminal, tables, plots, the dashboard."""

FORMATS = {
    "table": "compress.reports.formats:as_table",
    "markdown": "compress.reports.formats:as_markdown",
    "svg": "compress.reports.formats:as_svg",
    "csv": "compress.reports.formats:as_csv",
    "json": "compress.reports.formats:as_json",
}
"""The formats of `compress compare` and the functions that write them, `module:function`."""
