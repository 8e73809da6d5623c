"""A warning while torch's extension loader, which also builds DeepSpeed's operators, waits for its lock file.

The loader waits without a timeout, and a build that was killed leaves the file behind.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from adai_dist.integrations.import_hooks import after_import, wrap_once
from adai_dist.kernels.wait_notices import format_duration, notices_while_waiting

logger: logging.Logger = logging.getLogger("adai_dist")


def register() -> None:
    """Make torch's extension loader log which file it waits for when the wait is long.

    Collective: none.
    """
    after_import("torch.utils.file_baton", _register_with)


def _register_with(module: ModuleType) -> None:
    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def wait(baton: Any) -> None:
            start = time.monotonic()
            with notices_while_waiting(lambda: _warning(str(baton.lock_file_path), start), logger.warning):
                original(baton)

        return wait

    wrap_once(module.FileBaton, "wait", wrap)


def _warning(path: str, start: float) -> str | None:
    try:
        age = time.time() - os.stat(path).st_mtime
    except OSError:
        return None  # just removed
    waited, existed = format_duration(time.monotonic() - start), format_duration(age)
    return (
        f"waiting for {waited} for the file {path}, which is {existed} old: another process is compiling there, or was "
        "killed while compiling; if none is running, delete the file"
    )
