"""The parser of the command line: what it refuses is one line that names the nearest."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from ptq4sam.nearest import nearest

_CHOICES = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")


class OneLineParser(argparse.ArgumentParser):
    """Refuses arguments in one line, without argparse's list of all flags."""

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong, and leave with status 2."""
        found = _CHOICES.search(message)
        near = None if found is None else nearest(found[1], _words(found[2]))
        hint = f": did you mean {near}?" if near else ""
        sys.stderr.write(f"error: {' '.join(message.split())}{hint}; see {self.prog} --help\n")
        sys.exit(2)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but refuses what is unknown to a verb here, where its flags are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = nearest(flag, self._option_string_actions)
            hint = f": did you mean {near}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, unknown


def _words(choices: str) -> list[str]:
    return [choice.strip(" '") for choice in choices.split(",")]
