"""Exit codes, one-line errors, and the end of the process."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_STOPPED = 1, 2, 130, 143  # the last two are 128 + the signal


def report_error(message: str) -> int:
    """Print a message as one line on stderr and return the exit code for a user's mistake."""
    print(f"adai-dist: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return EXIT_USAGE


def report_missing_package(needed_by: str, error: ModuleNotFoundError, extra: str) -> int:
    """Print which extra installs a missing package and return the exit code for a user's mistake."""
    return report_error(f"{needed_by} needs the package {error.name}; got none; run: pip install 'adai-dist[{extra}]'")


def end_process(code: int) -> NoReturn:
    """End the process; after a distributed run, without running destructors.

    Gloo's destructors occasionally abort after a successful run, and after an error may wait for ranks that are gone.
    Call this while the error, which keeps its objects alive, is being handled.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    job = sys.modules.get("adai_dist.recipes.job")
    if job is not None and job.is_launched(os.environ):
        os._exit(code)
    sys.exit(code)
