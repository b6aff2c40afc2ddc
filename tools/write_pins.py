"""Record what the quantized vit_nano gives here, bit for bit, in tests/pins/pins.json.

    python tools/write_pins.py

To be run, and committed on its own, where results are to change: new weights, new versions.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ptq4sam.files import write_json  # noqa: E402
from tests.pins import pins  # noqa: E402


def main() -> None:
    """Quantize each case and write its record."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {case: pins.record(case, Path(folder)) for case in pins.CASES}
    write_json({"here": pins.here(), "cases": cases}, pins.RECORDED)


if __name__ == "__main__":
    main()
