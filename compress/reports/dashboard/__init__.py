"""Records in, one page out that needs nothing else: no network, no server, no file beside it."""

from compress.reports.dashboard.page import render, serve

__all__ = ["render", "serve"]
