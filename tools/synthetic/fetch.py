"""Fetching the two npm packages with the pictures and their names, and reading them without trusting them."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils.errors import DataError
from utils.files import atomic_path

DEFAULT_REGISTRY = "https://registry.npmjs.org"
TIMEOUT_S = 120


@dataclass(frozen=True)
class Package:
    """A published npm package: what it is called, what its file hashes to, and what it may hold at most."""

    name: str
    version: str
    sha256: str
    max_bytes: int
    max_unpacked_bytes: int

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives the file."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def path(self) -> str:
        """Where a registry keeps it, below its own address."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


PICTURES = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    32_000_000,
    128_000_000,
)
NAMES = Package(
    "unicode-emoji-json",
    "0.9.0",
    "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    1_000_000,
    8_000_000,
)


def cache_folder() -> Path:
    """Return the user's cache folder for sprites; `XDG_CACHE_HOME` moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "textsam" / "sprites"


def fetch(package: Package, folder: Path, download: Callable[[Package, Path], None] | None = None) -> Path:
    """Return the package's file in `folder`, downloaded when it is not there.

    Args:
        download: writes a package to a path; `npm pack` or the registry itself where None.

    Raises:
        DataError: it cannot be had, or its hash is not the published one; nothing is kept then.
    """
    path = folder / package.file_name
    if path.is_file():
        _check_hash(package, path)
        return path
    with atomic_path(path) as temporary:
        (download or _download)(package, temporary)
        _check_hash(package, temporary, where=f"what was downloaded for {package.file_name}")
    return path


def _check_hash(package: Package, path: Path, where: str | None = None) -> None:
    size = path.stat().st_size
    found = hashlib.sha256(path.read_bytes()).hexdigest() if size <= package.max_bytes else f"{size} bytes, too large"
    if found != package.sha256:
        raise DataError(
            f"{where or path} is not {package.name} {package.version}: SHA-256 {found}, expected {package.sha256}. "
            f"Delete the file and try again, or put the right one there"
        )


def _download(package: Package, path: Path) -> None:
    """Get a package through `npm pack`, which knows the user's registry and proxy, else straight from the registry."""
    if shutil.which("npm") and _npm_pack(package, path):
        return
    setting = _registry()
    url = f"{setting.rstrip('/')}/{package.path}"
    remedy = f"Put {package.file_name} into a folder and give it as --sprites"
    if not url.startswith(("https://", "http://")):
        raise DataError(f"The npm registry {setting!r} is not an http address. {remedy}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            content = response.read(package.max_bytes + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(f"{package.name} {package.version} cannot be downloaded ({error}). {remedy}") from error
    path.write_bytes(content)


def _registry() -> str:
    settings = {name.lower(): value for name, value in os.environ.items() if value}
    return settings.get("npm_config_registry", DEFAULT_REGISTRY)


def _npm_pack(package: Package, path: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{package.name}@{package.version}"
        quick = ("--fetch-retries=1", "--fetch-timeout=60000")
        command = ["npm", "pack", "--silent", "--ignore-scripts", *quick, "--pack-destination", folder, wanted]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False, cwd=folder)
        except (OSError, subprocess.TimeoutExpired):
            return False
        packed = Path(folder) / package.file_name
        if done.returncode or not packed.is_file():
            return False
        shutil.copyfile(packed, path)
    return True


def read_members(path: Path, wanted: Callable[[str], bool], max_unpacked_bytes: int) -> dict[str, bytes]:
    """Return the files of a tarball whose names `wanted` accepts; nothing is unpacked to disk.

    Raises:
        DataError: it cannot be read, unpacks to more than allowed, or holds a link, a device or a name that leads out
            of its folder.
    """
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\\" in member.name:
                    raise DataError(f"{path} holds {member.name!r}, which leads out of its folder. Delete the file")
                if member.isdir():
                    continue
                if not member.isreg():
                    raise DataError(f"{path} holds {member.name!r}, which is not a plain file. Delete the file")
                total += member.size
                if total > max_unpacked_bytes:
                    raise DataError(f"{path} unpacks to more than {max_unpacked_bytes} bytes. Delete the file")
                if wanted(member.name):
                    stream = archive.extractfile(member)
                    found[member.name] = stream.read() if stream else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a tarball ({error}). Delete the file and try again") from error
    return found
