"""The file `lock` of torch's loader of extensions, DeepSpeed's operators among them.

The loader waits for ever while the file exists, and a build that was killed has left it behind.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from adai_dist.integrations.after_import import after_import, wrap_once
from adai_dist.kernels.wait_notices import format_duration, notices_while_waiting

logger: logging.Logger = logging.getLogger("adai_dist")


def register() -> None:
    """Have torch's loader say which file it waits for, where that takes long.

    Collective: none.
    """
    after_import("torch.utils.file_baton", _register_with)


def _register_with(module: ModuleType) -> None:
    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def wait(baton: Any) -> None:
            start = time.monotonic()
            with notices_while_waiting(lambda: _what_is_waited_for(str(baton.lock_file_path), start), logger.warning):
                original(baton)

        return wait

    wrap_once(module.FileBaton, "wait", wrap)


def _what_is_waited_for(path: str, start: float) -> str | None:
    try:
        age = time.time() - os.stat(path).st_mtime
    except OSError:
        return None  # it has just been removed
    waited, existed = format_duration(time.monotonic() - start), format_duration(age)
    return (
        f"waiting for {waited} for the file {path}, which is {existed} old: another process compiles there, or was "
        "killed while it did; if no process does, delete the file"
    )
