"""Nothing of the package needs what Windows or macOS do not have.

No test runs there. What Unix alone has is taken away from the package, not from the libraries,
which have their own ways on other systems; `make lint` looks for names that each of them lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_runs import REPOSITORY, Tiny

pytest_plugins = ("tests.tiny_fixtures",)

WITHOUT_UNIX = """
import builtins, os, pkgutil, signal, sys
import numpy, PIL.Image, psutil, pycocotools.mask, rich.console, rich.live, rich.progress, scipy
import scipy.optimize, scipy.signal, torch, torch.distributed, torchvision, yaml, filelock

MODULES = {
    "resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline", "curses",
    "posix", "spwd", "crypt", "nis",
}
FUNCTIONS = {
    os: [
        "fork", "forkpty", "killpg", "setsid", "setpgid", "getpgid", "getuid", "geteuid", "getgid",
        "getegid", "sched_getaffinity", "sched_setaffinity", "mkfifo", "chown", "fchmod", "lchown",
        "uname", "sysconf", "nice", "statvfs", "getloadavg", "posix_fallocate", "wait",
    ],
    signal: ["SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "alarm"],
}


def is_ours(frame):
    return frame.f_globals.get("__name__", "").partition(".")[0] == "ptq4sam"


imported = builtins.__import__


def without(name, *arguments, **named):
    if name.partition(".")[0] in MODULES and is_ours(sys._getframe(1)):
        raise ModuleNotFoundError(f"Windows has no module {name}")
    return imported(name, *arguments, **named)


builtins.__import__ = without
for module, names in FUNCTIONS.items():

    class Without(type(module)):
        def __getattribute__(self, name, _names=frozenset(names), _module=module):
            if name in _names and is_ours(sys._getframe(1)):
                raise AttributeError(f"Windows has no {_module.__name__}.{name}")
            return super().__getattribute__(name)

    module.__class__ = Without

import ptq4sam
"""

EVERY_MODULE = (
    WITHOUT_UNIX
    + """
found = 0
for one in pkgutil.walk_packages(ptq4sam.__path__, "ptq4sam."):
    if not one.name.endswith("__main__"):
        __import__(one.name)
        found += 1
print(found)
"""
)
NEEDS_UNIX = (
    WITHOUT_UNIX
    + """
for line in sys.argv[1:]:
    try:
        exec(line, {"__name__": "ptq4sam.new"})
    except (ModuleNotFoundError, AttributeError) as error:
        print(error)
"""
)
ONE_RUN = (
    WITHOUT_UNIX
    + """
from ptq4sam.cli import main
sys.exit(main(sys.argv[1:]))
"""
)


def python(script: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_can_be_imported_without_unix(tmp_path: Path) -> None:
    done = python(EVERY_MODULE, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    files = len(list((REPOSITORY / "ptq4sam").rglob("*.py")))
    # All but the package itself and __main__.
    assert int(done.stdout) == files - 2


def test_the_bars_are_real(tmp_path: Path) -> None:
    """The test above can fail: a module of ours that needs Unix is seen."""
    lines = ("import resource", "import os; os.fork", "import signal; signal.SIGKILL")
    done = python(NEEDS_UNIX, *lines, folder=tmp_path)
    assert done.stdout.splitlines() == [
        "Windows has no module resource",
        "Windows has no os.fork",
        "Windows has no signal.SIGKILL",
    ], done.stderr[-2000:]


def test_a_run_needs_no_unix(tiny: Tiny, tmp_path: Path) -> None:
    command = ["quantize", *tiny.model(), *tiny.data(), *tiny.scheme("ptq4sam-s44"), "--limit", "1"]
    command += ["--decoder-only", "--prompts", "scene-detector"]
    command += ["--output", "model.safetensors", "--work-dir", "w"]
    done = python(ONE_RUN, *command, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "w" / "metrics.json").is_file()


def test_a_terminal_without_our_letters_gets_escapes(tiny: Tiny, tmp_path: Path) -> None:
    """Windows' own encodings lack most of what a folder may be called."""
    work_dir = tmp_path / "Übung 漢字 ±"
    command = ["evaluate", *tiny.model(), *tiny.data(), "--limit", "1", "--work-dir", work_dir]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "cp1252",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ptq4sam", *map(str, command)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")[-2000:]
    assert r"Übung \u6f22\u5b57 ±" in done.stdout.decode("cp1252")
    assert (work_dir / "metrics.json").is_file()
