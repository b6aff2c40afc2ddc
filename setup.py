"""What pyproject.toml cannot say: which files beside the package a wheel holds in it."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("exp", "projects", "mmdetection")  # where they are looked for: ptq4sam/shipped.py


class BuildWithShipped(build_py):
    """An installed package has what a checkout has at its top; an editable one reads it there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in SHIPPED:
                self.copy_tree(name, str(Path(self.build_lib, "ptq4sam", "assets", name)))


setup(cmdclass={"build_py": BuildWithShipped})
