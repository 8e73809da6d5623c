"""Files and folders that are complete or absent, whenever the process, or the machine, stops.

A name appears by a rename, and only after its content has reached the disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from adai_dist.kernels.build_cache import sync

_HIDDEN = ".removing-"


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever reads it finds the old text or the new one."""
    writing = path.with_name(f"{path.name}.writing")
    writing.write_text(text)
    sync(writing)
    writing.replace(path)
    sync(path.parent)


def publish(writing: Path, published: Path) -> None:
    """Gives a folder, whose files are on the disk, its final name; `published` must not exist."""
    for folder in (*(path for path in writing.rglob("*") if path.is_dir()), writing):
        sync(folder)
    writing.rename(published)  # the commit
    sync(published.parent)


def discard(folder: Path) -> None:
    """Removes a folder. Its name goes first, so that half of it is never taken for the whole."""
    hidden = folder.with_name(f"{_HIDDEN}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def discard_leftovers(parent: Path, *patterns: str) -> None:
    """Removes what a killed `discard` left, and folders whose names match one of the patterns."""
    for pattern in (f"{_HIDDEN}*", *patterns):
        for folder in parent.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
