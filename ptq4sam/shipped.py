"""Files that ship with the package: schemes, configurations, sweeps.

In a checkout they lie at its top (`exp/`, `projects/`, `mmdetection/`); a wheel holds them in
`ptq4sam/assets/` (setup.py).
"""

from __future__ import annotations

from pathlib import Path

from ptq4sam.errors import ConfigError
from ptq4sam.nearest import nearest

_PACKAGE = Path(__file__).resolve().parent
_ASSETS = _PACKAGE / "assets"

ROOT = _ASSETS if (_ASSETS / "exp").is_dir() else _PACKAGE.parent
"""The folder of `exp/`, `projects/` and `mmdetection/`."""

SCHEMES = Path("exp")
SWEEPS = Path("exp/sweeps")
CONFIGS = Path("projects/configs")


def located(path: Path) -> Path:
    """A file or folder where it is: as given, or below ROOT where only that one is there."""
    shipped = ROOT / path
    return shipped if not path.exists() and shipped.exists() else path


def find(given: str | Path, folder: Path, what: str) -> Path:
    """The file that a path or the name of a shipped one means.

    Args:
        given: a path, in the current folder or among what ships, or a name: that of a file of
            `folder` without its suffix, as ptq4sam-l44, in a folder of it as tinysam/w8a8.
        folder: SCHEMES, SWEEPS or CONFIGS.
        what: it is, for messages, as "scheme".

    Raises:
        ConfigError: it is a name, or a file here, and none of those; the nearest one is named.
    """
    path = located(Path(given))
    if path.is_file() or path.is_absolute():
        return path
    names = shipped_names(folder)
    if not path.suffix and len(path.parts) > 1:
        inside = ROOT / folder / f"{given}.yaml"
        return inside if inside.is_file() else path
    if path.suffix:
        if len(path.parts) == 1 and path.stem in names:
            raise ConfigError(
                f"there is no file {given} here: the {what} that ships is named {path.stem}"
            )
        return path
    if str(given) in names:
        return names[str(given)]
    near = nearest(str(given), names)
    hint = f"did you mean {near}? there are" if near else "there are"
    raise ConfigError(
        f"no {what} is named {str(given)!r}: {hint} {', '.join(names)}; or give a file"
    )


def shipped_names(folder: Path) -> dict[str, Path]:
    """The files of a folder that ships, by their names without suffix.

    Configurations lie in a folder for each detector; those that others are based on have no name.
    """
    pattern = "[!_]*/*.py" if folder == CONFIGS else "*.yaml"
    return {path.stem: path for path in sorted((ROOT / folder).glob(pattern))}
