"""Where tests look for what is not in the project."""

from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared"
