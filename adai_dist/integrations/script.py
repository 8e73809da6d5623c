"""`adai-dist run`: run a script or module as Python would, with the optimizers registered with DeepSpeed.

The program need not import this package to have `"optimizer": {"type": "Adai"}` in its DeepSpeed configuration.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
import types
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any, NamedTuple

from adai_dist.integrations.deepspeed.registration import register

_LOCAL_RANK = ("--local_rank=", "--local-rank=")  # DeepSpeed's launcher, torch.distributed.launch


class NoProgramError(ValueError):
    """Error for a script or module that does not exist; its message is one line for the command line."""


class _Program(NamedTuple):
    code: types.CodeType
    argv0: str
    settings: dict[str, Any]
    """Global names that Python defines in `__main__`."""


def split_local_rank(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off the argument that a launcher inserts before those of the module that it starts.

    Returns:
        The launcher's arguments (`--local_rank=0`, or none), and the user's.
    """
    num_words = 1 if arguments and arguments[0].startswith(_LOCAL_RANK) else 0
    return list(arguments[:num_words]), list(arguments[num_words:])


def run_program(name: str, arguments: Sequence[str], *, is_module: bool = False) -> None:
    """Run a program as `__main__`, which `sys.modules` keeps afterwards.

    The optimizers are registered in this process only; processes that the program starts must `import adai_dist`.

    Args:
        name: path of a script (or of a folder or zip file with a `__main__.py`), or name of a module.
        arguments: command line of the program, without its name.
        is_module: whether `name` is a module, as for `python -m`.

    Raises:
        NoProgramError: the program does not exist.
        BaseException: any exception of the program; if it is not caught, the traceback shows only the program's frames.
    """
    register()
    sys.argv[:] = ["-m" if is_module else name, *arguments]
    try:
        if is_module:
            _set_first_path(os.getcwd())
            program = _find_module(name)
        elif os.path.isdir(name) or zipfile.is_zipfile(name):
            _set_first_path(os.path.abspath(name))
            program = _find_main_in(name)
        else:
            program = _read_script(name)
            _set_first_path(os.path.dirname(os.path.realpath(name)))
        sys.argv[0] = program.argv0
        main = types.ModuleType("__main__")
        main.__dict__.update(program.settings, __builtins__=builtins)
        sys.modules["__main__"] = main
        exec(program.code, main.__dict__)
    except (SystemExit, NoProgramError):
        raise
    except BaseException as error:
        _print_only(_program_frames(error.__traceback__))
        raise


def _read_script(name: str) -> _Program:
    path = os.path.abspath(name)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        advice = f"for a module, write: run -m {name}"
        raise NoProgramError(f"run needs a script; got {name!r}, {error.strerror}; {advice}") from None
    loader = SourceFileLoader("__main__", path)
    code = compile(source, path, "exec", dont_inherit=True)
    return _Program(code, name, {"__file__": path, "__loader__": loader, "__cached__": None})


def _find_main_in(name: str) -> _Program:
    spec = PathFinder.find_spec("__main__", [os.path.abspath(name)])
    return _from_spec(spec, name, name, f"put a __main__.py into {name}")


def _find_module(name: str) -> _Program:
    try:
        spec = importlib.util.find_spec(name)  # imports its parent packages
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.__main__".startswith(f"{error.name}."):
            raise
        spec = None
    advice = "a package needs a module __main__" if sys.modules.get(name) else "check the spelling and the folder"
    return _from_spec(spec, name, None, advice)


def _from_spec(spec: ModuleSpec | None, name: str, argv0: str | None, advice: str) -> _Program:
    loader: Any = spec and spec.loader
    code = loader.get_code(spec.name) if spec is not None and hasattr(loader, "get_code") else None
    if spec is None or code is None:
        raise NoProgramError(f"run needs a module with Python code; got {name!r}; {advice}")
    settings = {"__file__": spec.origin, "__cached__": spec.cached, "__package__": spec.parent}
    return _Program(code, argv0 or str(spec.origin), {**settings, "__loader__": loader, "__spec__": spec})


def _set_first_path(folder: str) -> None:
    """Set the first entry of `sys.path`, as Python does for a script."""
    if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):  # these flags add no such entry
        sys.path[:1] = [folder]


def _program_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, importlib.util.__file__):
        trace = trace.tb_next
    return trace


def _print_only(trace: types.TracebackType | None) -> None:
    """Pass only the frames of the program to `sys.excepthook`, Python's or the program's own."""
    hook = sys.excepthook

    def print_exception(kind: type[BaseException], error: BaseException, _: types.TracebackType | None) -> None:
        hook(kind, error.with_traceback(trace), trace)

    sys.excepthook = print_exception
