"""Everything is in pyproject.toml but this: a build starts from nothing, so that build/ cannot hold stale modules."""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class CleanBuild(build_py):
    """`build_py` into a folder that is empty, whatever an earlier build left there."""

    def run(self) -> None:
        """Remove the folder, then build."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build_py": CleanBuild})
