"""Records for people: terminal, tables, plots, the dashboard."""
