import dataclasses
import hashlib
import io
import json
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
    asset = dataclasses.replace(assets.ASSETS["tiny"], pattern="*.txt")
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    with pytest.raises(OSError, match=r"holds no \*\.txt under tinyfm/model"):
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
        pattern="*_Truth.txt",
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    monkeypatch.setattr(assets, "_download", lambda asset, scratch: archive)
    folder = assets.fetch("tiny")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("a_Truth.txt", b"a")]


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
    with pytest.raises(ValueError, match=r"no asset is called 'bert'; the known ones are \['mini"):
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
