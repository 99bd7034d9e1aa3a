"""Errors a user can cause. Each message says the value, the choices and the remedy."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class SpikeplugError(Exception):
    """Base of every error whose text is meant for the user; the CLI prints it as one line."""


class OptionError(SpikeplugError, ValueError):
    """An option has a value, or a name, that is not allowed."""


class UnknownNameError(SpikeplugError, LookupError):
    """A plugin part of this name is not installed."""


class PluginError(SpikeplugError):
    """A plugin, or a pair of plugins, breaks the rules."""


class NonFiniteError(SpikeplugError, ValueError):
    """NaN or infinity where a number is needed."""


class CalibrationError(SpikeplugError):
    """A site has no scale yet, or its calibration data cannot give one."""

    index: int | None = None
    """Which of several sites it is about, where they are fitted together."""


class ConversionError(SpikeplugError):
    """A model cannot be converted as asked."""


class BundleError(SpikeplugError):
    """A saved model cannot be read or written."""


@contextlib.contextmanager
def indexed(index: int) -> Iterator[None]:
    """Put the place of a site among several into a CalibrationError."""
    try:
        yield
    except CalibrationError as error:
        error.index = index
        raise


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"`, or an empty string when no choice is near."""
    close = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Return the names, each once, sorted and joined for a message, or "none"."""
    return ", ".join(sorted(set(names))) or "none"
