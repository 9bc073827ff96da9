"""The dashboard: one self-contained HTML page made from records. It needs no network, no server and no other file."""

from compress.reports.dashboard.page import render, serve

__all__ = ["render", "serve"]
