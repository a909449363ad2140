"""Makes .venv where it is missing and installs what a group of requirements still lacks.

    python3 tools/venv.py build|<an extra of pyproject.toml>

Where the Python that runs this has a torch >= 2.10, .venv sees that Python's packages. A package that the machine
brings is left alone as long as it is in the range that pyproject.toml asks for; everything inside .venv follows
constraints.txt. Where nothing lacks, pip is not called and no network is touched.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
VENV = (ROOT / ".venv").resolve()
PYTHON = VENV / "bin" / "python"


# --- run by the machine's Python -------------------------------------------------------------------------------------


def machine_torch() -> str | None:
    """The version of a torch >= 2.10 that the running Python has."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    release = re.match(r"(\d+)\.(\d+)", version)
    return version if release and (int(release[1]), int(release[2])) >= (2, 10) else None


def create_venv() -> None:
    torch = machine_torch()
    inside_venv = sys.prefix != sys.base_prefix
    origin = f"over the torch {torch} of {sys.prefix}" if torch else "with a torch of its own"
    print(f"tools/venv.py: creating .venv {origin}", flush=True)
    command = [sys.executable, "-m", "venv"]
    if torch and not inside_venv:
        command.append("--system-site-packages")
    if torch and util.find_spec("pip"):
        command.append("--without-pip")  # the machine's pip and setuptools serve; those of ensurepip would hide them
    subprocess.run([*command, str(VENV)], check=True)
    if torch and inside_venv:
        # A venv made from a venv sees the packages of the Python below both, never those of the one it was made from.
        folder = VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (folder / "parent_venv.pth").write_text("\n".join(site.getsitepackages()) + "\n")


# --- run by .venv's Python -------------------------------------------------------------------------------------------


class Project:
    """What pyproject.toml and constraints.txt ask for."""

    def __init__(self) -> None:
        try:
            import tomllib
        except ModuleNotFoundError:  # Python 3.10
            from pip._vendor import tomli as tomllib

        tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
        self.name = tables["project"]["name"]
        self.extras = tables["project"]["optional-dependencies"]
        self.core = self.expand([*tables["project"]["dependencies"], *tables["build-system"]["requires"]])
        self.tools = {tool.name for tool in self.expand(self.extras["lint"])}
        lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
        self.pins = {pin.name: pin.specifier for pin in self.expand([line for line in lines if line])}

    def expand(self, lines: list[str]) -> list[Requirement]:
        """The requirements that hold on this Python, rnnkern[extra] replaced by what the extra holds."""
        from pip._vendor.packaging.requirements import Requirement

        found = []
        for requirement in map(Requirement, lines):
            if requirement.name == self.name:
                for extra in sorted(requirement.extras):
                    found += self.expand(self.extras[extra])
            elif requirement.marker is None or requirement.marker.evaluate():
                found.append(requirement)
        return found

    def group(self, name: str) -> list[Requirement]:
        if name != "build" and name not in self.extras:
            raise SystemExit(f"group {name!r}: expected build, {', '.join(self.extras)}")
        return self.core if name == "build" else self.core + self.expand(self.extras[name])

    def lacks(self, requirement: Requirement) -> bool:
        name = requirement.name
        if name == "ninja" and shutil.which("ninja"):
            return False
        found = installed(name)
        if found is None or not requirement.specifier.contains(found[0], prereleases=True):
            return True
        version, ours = found
        if not ours:
            return name in self.tools  # of another version it would find other faults, and elsewhere `make` misses it
        return name in self.pins and not self.pins[name].contains(version, prereleases=True)

    def constraints(self, missing: list[Requirement]) -> list[str]:
        """The pins, without those of packages that the machine brings; its torch must stay what it is."""
        wanted = {requirement.name for requirement in missing}
        lines = []
        for name, pin in self.pins.items():
            found = installed(name)
            if found is None or found[1] or name in wanted:
                lines.append(f"{name}{pin}")
            elif name == "torch":
                lines.append(f"torch=={found[0]}")
        return lines


def installed(name: str) -> tuple[str, bool] | None:
    """A distribution's version, and whether it lies inside .venv."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return found.version, Path(str(found.locate_file(""))).resolve().is_relative_to(VENV)


def pip_install(requirements: list[Requirement], constraints: list[str], *options: str) -> bool:
    if not requirements:
        return True
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints) + "\n")
        file.flush()
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--constraint", file.name]
        return subprocess.run([*command, *options, *sorted({str(each) for each in requirements})]).returncode == 0


def install(group: str) -> int:
    project = Project()
    missing = [requirement for requirement in project.group(group) if project.lacks(requirement)]
    tools = [requirement for requirement in missing if requirement.name in project.tools]
    others = [requirement for requirement in missing if requirement.name not in project.tools]
    constraints = project.constraints(missing)
    if not (pip_install(others, constraints) and pip_install(tools, constraints, "--ignore-installed")):
        # No network, say. Where rnnkern itself can be built and run, what needs the rest fails when it gets there.
        print(f"tools/venv.py: could not install {', '.join(map(str, missing))}", file=sys.stderr)
        fatal = {requirement.name for requirement in project.core} - {"ninja"}  # without ninja the build is only slow
        return int(any(requirement.name in fatal for requirement in missing))
    (VENV / f".stamp-{group}").touch()
    return 0


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    if Path(sys.prefix).resolve() != VENV:
        if not PYTHON.exists():
            create_venv()
        os.execv(PYTHON, [str(PYTHON), __file__, sys.argv[1]])
    return install(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
