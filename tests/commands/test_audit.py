"""`ptq4sam audit`."""

from __future__ import annotations

import pytest

from ptq4sam.cli import main
from tests.tiny_runs import Quantized

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


def test_audit_of_a_file(quantized: Quantized, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(quantized.path)]) == 0
    assert capsys.readouterr().out.startswith("audit passed")
