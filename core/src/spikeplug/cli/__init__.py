"""The command line, and what the commands of plugins share with it."""

from .console import Json, language, print_json, print_table, progress, settings, vision
from .main import main

__all__ = ["Json", "language", "main", "print_json", "print_table", "progress", "settings", "vision"]
