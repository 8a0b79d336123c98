"""Hands the build of the compiled modules to CMakeLists.txt."""

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds all modules in one CMake run and keeps those that came out of it."""

    def run(self) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        built = build / "modules"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": built,
            "Python_EXECUTABLE": sys.executable,
            "RADAM_CUDA": "OFF" if os.environ.get("RADAM_CUDA") == "0" else "ON",
        }
        if archs := os.environ.get("RADAM_CUDA_ARCHS"):
            options["RADAM_CUDA_ARCHS"] = archs.replace(",", ";")
        flags = [f"-D{name}={value}" for name, value in options.items()]
        flags += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags]
        # A build folder of another tree or another machine cannot be configured again.
        configure.append("--fresh") if (build / "CMakeCache.txt").exists() else None
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)

        # No nvcc, no _cuda: the doctor tells the user so.
        self.extensions = [e for e in self.extensions if self._module(built, e)]
        for extension in self.extensions:
            self.copy_module(self._module(built, extension), extension)
        if self.inplace:
            self.copy_extensions_to_source()

    @staticmethod
    def _module(built: Path, extension: Extension) -> Path | None:
        return next(built.glob(f"{extension.name.rpartition('.')[2]}.*"), None)

    def copy_module(self, module: Path, extension: Extension) -> None:
        target = Path(self.build_lib, self.get_ext_filename(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(module), str(target))


def folders() -> dict[str, dict[str, str]]:
    """Where to write what a build leaves: beside the sources, unless they are read-only."""
    if os.access(ROOT, os.W_OK):
        return {}
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return {"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}}


setup(
    options=folders(),
    # Declared, because an editable install holds only what it was told of.
    ext_modules=[Extension(f"radam_kernels.{name}", sources=[]) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
