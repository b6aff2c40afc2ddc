"""`ptq4sam download`: get published weights and data by name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ptq4sam.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam download`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="as --list has them")
    parser.add_argument("--list", action="store_true", help="what there is, and what is here")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="folder of ckpt/ and data/; default: here"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam.columns import terminal_width
    from ptq4sam.downloads.terminal import download, listing

    if parsed.list:
        sys.stdout.write("\n".join(listing(parsed.root, terminal_width())) + "\n")
        return 0
    if not parsed.names:
        raise ConfigError("ptq4sam download needs names: ptq4sam download --list shows them")
    download(parsed.names, parsed.root)
    return 0
