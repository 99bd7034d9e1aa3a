"""What can be wrong with an installation, found without importing the packages that may be broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys

from spikeplug.plugins import registry


def examine() -> list[dict[str, str]]:
    """Every check with its `status`: `ok`, `problem`, or `note` for something that costs speed or a feature only."""
    checks = [_python(), _companion("torchvision", 15), _companion("torchaudio", None), _compiler(), _transformers()]
    return [*checks, *_plugins()]


def _check(check: str, status: str, what: str, remedy: str = "") -> dict[str, str]:
    return {"check": check, "status": status, "what": what, "remedy": remedy}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> dict[str, str]:
    return _check("python", "ok", sys.version.split()[0])


def _companion(package: str, minor_offset: int | None) -> dict[str, str]:
    """torchvision 0.(n+15) and torchaudio 2.n belong to torch 2.n, and a CPU build to a CPU build."""
    torch, found = _version("torch") or "?", _version(package)
    if found is None:
        return _check(package, "ok", "not installed, not needed")
    major, minor = torch.split(".")[:2]
    wanted = f"{major}.{minor}" if minor_offset is None else f"0.{int(minor) + minor_offset}"
    fix = f"pip install 'torch=={torch.partition('+')[0]}' '{package}=={wanted}.*'"
    if ".".join(found.split(".")[:2]) != wanted:
        return _check(package, "problem", f"{found} beside torch {torch}: imports of {package} fail", fix)
    if ("+cpu" in torch) != ("+cpu" in found) and "+" in torch + found:
        return _check(package, "problem", f"{found} and torch {torch} are different builds", fix)
    return _check(package, "ok", f"{found} beside torch {torch}")


def _compiler() -> dict[str, str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler:
        return _check("c++ compiler", "ok", compiler)
    return _check("c++ compiler", "note", "none: torch.compile is not available on the CPU; eager code runs", "g++")


def _transformers() -> dict[str, str]:
    version = _version("transformers")
    if version is None:
        return _check("transformers", "note", "not installed: no language models", "pip install spikeplug-transformers")
    # Importing a model class is what fails beside a mismatched torchaudio; a process of its own keeps us alive.
    command = [sys.executable, "-c", "from transformers import LlamaForCausalLM"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return _check("transformers", "ok", version)
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return _check("transformers", "problem", f"{version} cannot import its models: {last}", "mend the packages above")


def _plugins() -> list[dict[str, str]]:
    return [
        _check(f"plugin {plugin.name}", "problem", plugin.broken, f"pip install --upgrade {plugin.dist}")
        if plugin.broken
        else _check(f"plugin {plugin.name}", "ok", f"{plugin.dist} {plugin.version}")
        for plugin in registry().plugins
    ]
