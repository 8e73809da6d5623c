"""Files and folders that are complete or absent, even if the process or the machine stops at any moment.

A name appears by a rename, and only after its content has reached the disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from adai_dist.kernels.build_cache import sync

_HIDDEN = ".removing-"


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file: a reader finds the old text or the new one."""
    writing = path.with_name(f"{path.name}.writing")
    writing.write_text(text)
    sync(writing)
    writing.replace(path)
    sync(path.parent)


def publish(writing: Path, published: Path) -> None:
    """Give a folder, whose files are on the disk, its final name, which must not exist yet."""
    for folder in (*(path for path in writing.rglob("*") if path.is_dir()), writing):
        sync(folder)
    writing.rename(published)  # the commit
    sync(published.parent)


def remove(folder: Path) -> None:
    """Remove a folder, its name first, so that a partly removed one is never taken for a complete one."""
    hidden = folder.with_name(f"{_HIDDEN}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Remove what a killed ``remove`` left behind, and the folders whose names match the pattern."""
    for each in (f"{_HIDDEN}*", pattern):
        for folder in parent.glob(each):
            shutil.rmtree(folder, ignore_errors=True)
