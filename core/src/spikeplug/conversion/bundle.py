"""Saved models: a folder of safetensors and JSON with a SHA-256 of every file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

import spikeplug
from spikeplug import plugins
from spikeplug.coding.site import sites
from spikeplug.config import ConversionConfig
from spikeplug.errors import BundleError, CalibrationError

from .record import conversion_of, refuse_replaced
from .verbs import set_execution

MANIFEST = "spikeplug.json"
FORMAT = 2


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False, **options: Any) -> None:
    """Write a converted model to a folder. The folder appears whole, or not at all.

    Args:
        options: what the architecture can store beside the model: `tokenizer` for a language model.

    Raises:
        CalibrationError: a site has no parameters yet.
        BundleError: the folder exists (and `overwrite` is not set, or it holds something else than a saved model), or
            cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps; its own names would not be found again
    conversion = conversion_of(model)
    refuse_replaced(model)
    architecture = plugins.get_class("architecture", conversion.architecture)()
    for site in sites(model).values():
        if not site.calibrated:
            raise CalibrationError(f"site '{site.name}' is not calibrated: calibrate the model before saving it")
    target = Path(os.path.abspath(path))  # "." has no name to put a draft beside
    check_writable(target, overwrite=overwrite)
    try:
        head = {"architecture": conversion.architecture, "config": conversion.config.model_dump(mode="json")}
        write_folder(target, head, lambda folder: architecture.save(model, folder, **options))
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error


def check_writable(target: Path, *, overwrite: bool = False) -> None:
    """Refuse, before any work is done, a folder that `save` could not write.

    Raises:
        BundleError: as `save`.
    """
    try:
        if target.is_symlink() and not target.exists():
            raise BundleError(f"{target} is a link that leads nowhere: choose another folder")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            if not overwrite:
                raise BundleError(f"{target} exists: choose another folder, or allow it to be overwritten")
            if not (target / MANIFEST).is_file():
                raise BundleError(f"{target} is no saved model and is not overwritten: choose another folder")
        above = next(parent for parent in target.absolute().parents if parent.exists())
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror or error}") from None
    if not above.is_dir():
        raise BundleError(f"cannot write {target}: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BundleError(f"cannot write {target}: no permission to write in {above}")


def load(path: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Read what `save` wrote; the result is bit-equal.

    Args:
        options: what the architecture needs: `device_map` and the like for a language model; `model=net`, the dense
            network, for one that was converted layer by layer. A captured network needs none.

    Raises:
        BundleError: the folder is not a saved model, or a file is missing or was changed.
        UnknownNameError: a plugin that the model needs is not installed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    verify(folder, manifest["files"])
    config = ConversionConfig.parse(manifest["config"])
    architecture = plugins.get_class("architecture", manifest["architecture"])()
    model: nn.Module = architecture.load(folder, config=config, **options)
    return set_execution(model, config.execution)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved model.

    Raises:
        BundleError: there is none, or it is not one of ours, or is newer than this release.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not {"format", "spikeplug", "architecture", "config", "files", "digest"} <= set(manifest):
            raise KeyError("files")
        if manifest["format"] != FORMAT:
            hint = "install that or a later one" if manifest["format"] > FORMAT else "convert the network anew"
            raise BundleError(f"{folder} was written by spikeplug {manifest['spikeplug']} in another format: {hint}")
        if not isinstance(manifest["files"], dict) or manifest["digest"] != _digest(manifest):
            raise KeyError("digest")
    except FileNotFoundError:
        raise BundleError(f"{folder} is no saved model: it has no {MANIFEST}") from None
    except OSError as error:
        raise BundleError(f"cannot read {folder / MANIFEST}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{folder / MANIFEST} was changed or damaged: it is not what `save` wrote") from None
    return dict(manifest)


def verify(folder: Path, files: dict[str, str], only: set[str] | None = None) -> None:
    """Compare files of a folder with the SHA-256 in its manifest.

    Raises:
        BundleError: a file is missing or was changed.
    """
    for name, digest in files.items():
        if only is not None and name not in only:
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{folder / MANIFEST} names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise BundleError(f"{folder} lacks the file {name} that its manifest names")
        if _sha256(folder / name) != digest:
            raise BundleError(f"{folder / name} was changed or damaged: its SHA-256 is not the manifest's")


def write_folder(target: Path, head: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all, with a manifest: `head`, and the SHA-256 of every file that `fill` makes.

    Raises OSError, and whatever `fill` raises; what was there before is then still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last move stays within one file system and is atomic.
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(draft)
        written = sorted(file for file in draft.rglob("*") if file.is_file())
        files = {file.relative_to(draft).as_posix(): _sha256(file) for file in written}
        manifest = {"format": FORMAT, "spikeplug": spikeplug.__version__, **head, "files": files}
        manifest["digest"] = _digest(manifest)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _share(draft)
        for file in [*written, draft / MANIFEST]:
            _sync(file)
        _replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(draft: Path, target: Path) -> None:
    """Put the draft in the target's place; if that fails half-way, the target is put back."""
    if not target.exists():
        os.replace(draft, target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        os.replace(target, retired / "old")
        os.replace(draft, target)
    finally:
        if not target.exists():
            os.replace(retired / "old", target)
        shutil.rmtree(retired, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give a private temporary folder the permissions that a plain `mkdir` and `open` would have given."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's own content."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
