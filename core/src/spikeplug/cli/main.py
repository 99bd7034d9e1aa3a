"""The command line: results on stdout, progress and errors on stderr, exit status 1 and one line for a user error."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

import spikeplug
from spikeplug import plugins as registry
from spikeplug.errors import PluginError, SpikeplugError

from . import networks
from .console import Json, print_json, print_table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Turn pretrained networks into spiking ones under coding schemes that are plugins.",
)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

TERMINATED = 143
"""Exit status after SIGTERM."""


def main() -> None:
    """Entry point of the console script."""
    # A plain kill unwinds as Ctrl-C does, so that no draft of a folder stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    with _one_line():
        for part in registry.registry().plugins:
            for command in part.parts:
                if command.kind == "command":
                    _add(command)
        try:
            app()
        finally:
            sys.stdout.flush()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except SpikeplugError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        # typer turns Ctrl-C into this status without a word.
        if end.code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
        raise
    except OSError as error:
        # Most often results that cannot be written: a full disk, a reader that went away. Python flushes once more at
        # its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


_ADDED: set[registry.Part] = set()
"""Commands of plugins that `main` has added in this process."""


def _add(command: registry.Part) -> None:
    """Add a plugin's command. One that cannot be imported must not take the others with it."""
    if command in _ADDED:
        return
    taken = {each.name for each in app.registered_commands} | {each.name for each in app.registered_groups}
    if command.name in taken:
        sys.stderr.write(f"warning: command '{command.name}' of plugin '{command.plugin}' is left out: it is taken\n")
        return
    try:
        registry.registry().find("command", command.name)
        brought = command.load()
    except PluginError as error:
        sys.stderr.write(f"warning: {error}\n")
        return
    _ADDED.add(command)
    if isinstance(brought, typer.Typer):
        app.add_typer(brought, name=command.name)
    else:
        app.command(command.name)(brought)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spikeplug {spikeplug.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@app.command("plugins")
def plugins_command(
    as_json: Json = False,
    probe: Annotated[bool, typer.Option(help="Import everything, each plugin in a process of its own.")] = False,
) -> None:
    """List the installed plugins, the sound and the broken ones."""
    found: list[dict[str, Any]] = []
    for plugin in registry.registry().plugins:
        broken = registry.probe(plugin) if probe else plugin.broken
        found.append(
            {
                "name": plugin.name,
                "distribution": plugin.dist,
                "version": plugin.version,
                "api": plugin.api,
                "brings": {kind: [part.name for part in plugin.parts if part.kind == kind] for kind in plugin.hooks},
                "status": f"broken: {broken}" if broken else "ok",
                "import_ms": round(plugin.import_ms, 1),
            }
        )
    if as_json:
        print_json(found)
    else:
        rows = [[*map(str, list(each.values())[:4]), _brings(each["brings"]), str(each["status"])] for each in found]
        print_table(["plugin", "distribution", "version", "api", "brings", "status"], rows)


@app.command("ls")
def ls_command(
    kind: Annotated[str, typer.Argument(help="recipes, encoders, neurons, approximators, passes, trainers, ...")],
    as_json: Json = False,
) -> None:
    """List the installed parts of a kind."""
    singular = {"passes": "pass"}.get(kind, kind if kind in registry.KINDS else kind.removesuffix("s"))
    found = registry.registry()
    parts = [part for name in found.names(singular) for part in found.parts[singular, name]]
    rows = [{"name": part.name, "plugin": part.plugin, "object": part.path} for part in parts]
    if as_json:
        print_json(rows)
    else:
        print_table(["name", "plugin", "object"], [list(row.values()) for row in rows])


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Look for mixtures of packages that do not work together, and say how to mend them."""
    from .doctor import examine

    checks = examine()
    if as_json:
        print_json(checks)
    else:
        print_table(["check", "status", "what", "remedy"], [list(check.values()) for check in checks])
    if any(check["status"] == "problem" for check in checks):
        raise typer.Exit(1)


def _brings(parts: dict[str, list[str]]) -> str:
    def listed(names: list[str]) -> str:
        return ", ".join(names) if len(names) <= 24 else f"{len(names)} of them"

    return "; ".join(f"{kind}: {listed(names)}" for kind, names in parts.items())


for _name in ("convert", "eval", "train", "export"):
    app.command(_name)(getattr(networks, f"{_name}_command"))
