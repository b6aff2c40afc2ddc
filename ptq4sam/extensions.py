"""Files and modules of users: which ones the environment names, and what of theirs failed.

What they register is in `quantization.registry`; here it is known by its words alone.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from ptq4sam.errors import ConfigError, Ptq4samError

EXTENSIONS = "PTQ4SAM_EXTENSIONS"
"""Environment variable: modules or .py files that register observers, quantizers, methods."""

_REGISTERED: dict[Any, str] = {}
"""What is not of this package, as "method clip-share", by the class or function."""


def note(item: Any, what: str) -> None:
    """Remember what a class or function is registered as, where it is not of this package."""
    if _package(item.__module__) != _package(__name__):
        _REGISTERED[item] = what


def foreign_name(item: object) -> str | None:
    """What a class or function is registered as, where it is not of this package."""
    return _REGISTERED.get(item)


def load_extensions() -> None:
    """Import what the environment variable names, each once.

    Raises:
        ConfigError: one of them is not there, is no Python, or has an error.
    """
    for name in _named():
        _check_name(name)
        try:
            _import(name)
        except ModuleNotFoundError as error:
            if name.endswith(".py") or not f"{name}.".startswith(f"{error.name}."):
                raise _broken(name, error) from error
            raise ConfigError(
                f"{EXTENSIONS} names {name}, a module that Python does not find: give the path of "
                "a .py file, or have its folder in PYTHONPATH"
            ) from error
        except Exception as error:
            raise _broken(name, error) from error


def told_of_extensions() -> str:
    """Which extensions were read and what they registered; how to name one where none is."""
    names = _named()
    if not names:
        return f"one of your own needs {EXTENSIONS}=FILE"
    told = []
    for name in names:
        module = _module_name(name)
        has = [
            what
            for item, what in _REGISTERED.items()
            if f"{item.__module__}.".startswith(f"{module}.")
        ]
        told.append(f"{name} was read and registers {', '.join(has) or 'nothing'}")
    return "; ".join(told)


def fault_of_extension(error: BaseException) -> str | None:
    """What failed in code that is not of this package: whose, file and line, and the error.

    Returns:
        one line, as "method clip-share (mine.py:14): NameError: name 'changd' is not defined"; None
        where the error did not pass through such code.
    """
    modules = {item.__module__ for item in _REGISTERED} | set(map(_module_name, _named()))
    who, place = "extension", None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") in modules:
            kinds = type(frame.f_locals.get("self")).__mro__
            who = next((_REGISTERED[kind] for kind in kinds if kind in _REGISTERED), who)
            place = f"{_short(frame.f_code.co_filename)}:{line}"
    return None if place is None else f"{who} ({place}): {_said(error)}"


def extensions_fingerprint() -> str:
    """Identifies what the modules and files of the environment variable say; empty without any.

    Of a module that cannot be found its name alone counts: whoever needs it says so.
    """
    names = _named()
    if not names:
        return ""
    content = hashlib.sha256()
    for name in names:
        path = Path(name) if name.endswith(".py") else _file_of(name)
        content.update(path.read_bytes() if path is not None and path.is_file() else name.encode())
    return content.hexdigest()[:16]


def _named() -> list[str]:
    return list(filter(None, os.environ.get(EXTENSIONS, "").split(os.pathsep)))


def _package(module: str) -> str:
    return module.partition(".")[0]


def _module_name(name: str) -> str:
    """The module that a file or module of the variable is."""
    return f"ptq4sam_extension_{Path(name).stem}" if name.endswith(".py") else name


def _check_name(name: str) -> None:
    """Refuse a path that is no .py file, or not there, naming the nearest one that is."""
    path = Path(name)
    is_path = len(path.parts) > 1 or path.is_file() or name.endswith(".py")
    if not is_path or (path.suffix == ".py" and path.is_file()):
        return
    if path.suffix == ".py" or not path.exists():
        problem = "which is not there"
    else:
        problem = "which is no .py file"
    there = {one.name: one for one in path.parent.glob("*.py")} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(path.name, there, n=1)
    advice = "give a module or the path of a .py file"
    if near:
        advice = f"did you mean {there[near[0]]}?"
    raise ConfigError(f"{EXTENSIONS} names {name}, {problem}: {advice}")


def _broken(name: str, error: Exception) -> ConfigError:
    """The error for an extension that failed while it was imported, at which line."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == _module_name(name)
    ]
    place = f"line {lines[-1]}" if lines else "its import"
    said = _said(error)
    if isinstance(error, SyntaxError) and error.filename is not None:
        place, said = f"line {error.lineno}", f"{type(error).__name__}: {error.msg}"
        if not lines and Path(error.filename).name != Path(name).name:
            place = f"{_short(error.filename)}:{error.lineno}"
    return ConfigError(f"{EXTENSIONS} names {name}, which has an error at {place}: {said}")


def _said(error: BaseException) -> str:
    """An error in one line, with its kind where the message does not say enough by itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Ptq4samError) else f"{type(error).__name__}: {text[:500]}"


def _short(path: str) -> str:
    """A file as seen from the working directory, where it lies below that."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return path


def _file_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _import(name: str) -> None:
    module_name = _module_name(name)
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for any import: known while it runs, gone where it fails.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
