from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ptq4sam.errors import ConfigError
from ptq4sam.extensions import EXTENSIONS
from ptq4sam.quantization.registry import Registry
from ptq4sam.quantization.scheme import Scheme
from tests.tiny_runs import SCHEMES


def test_a_name_is_registered_once() -> None:
    registry: Registry[type] = Registry("thing", ["Ours"])
    registry.register("Mine")(int)
    assert registry["Mine"] is int
    assert registry.names == ["Ours", "Mine"]
    with pytest.raises(ConfigError, match="there is another thing 'Mine'"):
        registry.register("Mine")(float)


def test_unknown_names_name_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXTENSIONS, raising=False)
    registry: Registry[type] = Registry("thing", ["MinMaxObserver"])
    registry.require("MinMaxObserver", "observer")
    with pytest.raises(ConfigError, match="observer: 'MinMax' given; did you mean 'MinMaxObs"):
        registry.require("MinMax", "observer")
    with pytest.raises(ConfigError, match="allowed: MinMaxObserver"):
        registry.require("x", "observer")
    with pytest.raises(ConfigError, match=f"allowed: none; one of your own needs {EXTENSIONS}="):
        Registry("method").require("x", "methods")
    monkeypatch.setenv(EXTENSIONS, "json")
    told = (
        r"allowed: none; json was read and registers nothing: yours needs @METHODS.register\('x'\)"
    )
    with pytest.raises(ConfigError, match=told):
        Registry("method").require("x", "methods")


def test_schemes_use_names_of_extensions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from ptq4sam.quantization.observers import OBSERVERS, MinMaxObserver\n"
        "@OBSERVERS.register('MineObserver')\n"
        "class Mine(MinMaxObserver):\n"
        "    per_tensor_only = True\n"
    )
    code = f"""
from ptq4sam.quantization.scheme import Scheme
scheme = Scheme.from_yaml({str(SCHEMES / "minmax44.yaml")!r})
print(scheme.with_overrides("a_qconfig.observer=MineObserver").a_qconfig.observer)
try:
    scheme.with_overrides("w_qconfig.observer=MineObserver")
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={EXTENSIONS: str(tmp_path / "mine.py"), "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("MineObserver\n")
    assert "MineObserver works per tensor only" in done.stdout


def test_methods_of_a_scheme_are_known_ones() -> None:
    scheme = Scheme.from_yaml(SCHEMES / "minmax44.yaml")
    with pytest.raises(ConfigError, match="methods: 'nothing' given"):
        scheme.with_overrides("methods=[nothing]")
