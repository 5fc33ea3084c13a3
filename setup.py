"""What pyproject.toml cannot say: `configs/` of the checkout is `avatarctl/configs` in a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies `configs/*/*.yaml` into the package; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in sorted(Path("configs").glob("*/*.yaml")):
            target = Path(self.build_lib, "avatarctl", source)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
