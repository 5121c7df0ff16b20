import os
import struct
import warnings

import pytest

from fmjax.data.splits import hash_split
from fmjax.data.translations import Message, load_translations, read_catalog, split_key

HEADER = b"Last-Translator: B\xe4chle\nContent-Type: text/plain; charset=%s\n"


def catalog(messages, *, charset="UTF-8", order="<"):
    """The bytes of a .mo file, as the gettext manual describes them."""
    entries = [(b"", HEADER % charset.encode())]
    entries += [(s.encode(charset), t.encode(charset)) for s, t in messages]
    count = len(entries)
    tables, strings = [], b""
    start = 28 + 16 * count
    for column in (0, 1):
        for entry in entries:
            tables.append(struct.pack(f"{order}2I", len(entry[column]), start + len(strings)))
            strings += entry[column] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return head + b"".join(tables) + strings


def install(folder, language, name, messages, **options):
    path = folder / language / "LC_MESSAGES" / f"{name}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(catalog(messages, **options))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1"])
def test_catalogs(tmp_path, order, charset):
    messages = [
        ("open it", "öffne es"),
        ("menu\x04open", "öffnen"),
        ("%d file\0%d files", "%d Datei\0%d Dateien"),
        ("%d dog\0%d dogs", "eins\0zwei\0viele"),
    ]
    path = install(tmp_path, "de", "a", messages, charset=charset, order=order)
    assert read_catalog(path) == [
        Message("open it", "öffne es"),
        Message("open", "öffnen"),
        Message("%d file", "%d Datei"),
        Message("%d files", "%d Dateien"),
    ]


def test_python_reads_the_same(tmp_path):
    import gettext

    path = tmp_path / "a.mo"
    path.write_bytes(catalog([("open it", "öffne es")]).replace(b"B\xe4chle", b"Bachle"))
    with path.open("rb") as file:
        assert gettext.GNUTranslations(file).gettext("open it") == "öffne es"
    assert read_catalog(path) == [("open it", "öffne es")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"PK" + c[2:], r"not a message catalog, its first bytes are b'PK"),
        (lambda c: c[:10], "not a message catalog"),
        (lambda c: c[:8] + struct.pack("<I", 2**31) + c[12:], "messages do not fit into"),
        (lambda c: c[:-5], "message 1 lies outside of the file"),
        (lambda c: c.replace(b"charset=UTF-8", b"charset=x-123"), "message 1: unknown encoding"),
        (lambda c: c.replace(b"charset=UTF-8", b"charset=ASCII"), "message 1: 'ascii' codec"),
    ],
)
def test_broken_catalogs(tmp_path, change, message):
    path = tmp_path / "a.mo"
    path.write_bytes(change(catalog([("open it", "öffne es")])))
    with pytest.raises(ValueError, match=message) as error:
        read_catalog(path)
    assert str(path) in str(error.value)


MANY = [
    (f"message of number {chr(97 + n // 26)}{chr(97 + n % 26)}x", f"Nachricht {n} ja")
    for n in range(300)
]


def load(folder, split="train", languages="en-de", at_least=1, **options):
    return load_translations(languages, split, folders=[folder], at_least=at_least, **options)


def all_of(folder, languages="en-de", **options):
    parts = [load(folder, split, languages, **options) for split in ("train", "val", "test")]
    return {s: t for part in parts for s, t in zip(part.sources, part.targets, strict=True)}


def test_pairs_of_both_directions(tmp_path):
    install(tmp_path, "de", "a", MANY)
    sizes = []
    for split in ("train", "val", "test"):
        there, back = load(tmp_path, split), load(tmp_path, split, "de-en")
        assert (there.sources, there.targets) == (back.targets, back.sources)
        assert {hash_split(split_key(source)) for source in there.sources} == {split}
        sizes.append(len(there))
    assert sum(sizes) == 300
    assert sizes[0] > 200
    assert min(sizes) > 10


def test_what_is_left_out_and_cleaned(tmp_path):
    messages = [
        ("%s: %s", "%s : %s"),
        ("%-10.3ld {name}", "{name} %-10.3ld"),
        ("file", "Datei"),
        ("untranslated text", "Untranslated Text"),
        ("with no translation", ""),
        ("too many words are in this", "hier sind zu viele Wörter drin"),
        ("  -v, --verbose\n      say more\n", "  -v, --verbose   mehr sagen\n"),
        ("_Open file", "Datei ö_ffnen"),
        ("use a_b or c_d", "nimm a_b oder c_d"),
        ("said twice", "zweimal gesagt"),
    ]
    install(tmp_path, "de", "a", messages)
    install(tmp_path, "de", "b", [("said twice", "anders gesagt"), ("only here", "nur hier")])
    install(tmp_path, "de", "iso_639-3", [("Old English", "Altenglisch")])
    install(tmp_path, "fr", "a", [("in French", "en français")])
    assert all_of(tmp_path, max_words=5) == {
        "-v, --verbose say more": "-v, --verbose mehr sagen",
        "Open file": "Datei öffnen",
        "use a_b or c_d": "nimm a_b oder c_d",
        "said twice": "zweimal gesagt",
        "only here": "nur hier",
    }
    assert "file" in all_of(tmp_path, min_words=1)
    assert all_of(tmp_path, "fr-en") == {"en français": "in French"}


def test_messages_that_differ_in_signs_are_in_one_split(tmp_path):
    variants = [f"cannot open the file{sign}" for sign in ("", ".", ": %s", " '%d'!")]
    install(tmp_path, "de", "a", [(text, f"Datei {n} nein") for n, text in enumerate(variants)])
    sizes = [len(load(tmp_path, split)) for split in ("train", "val", "test")]
    assert sorted(sizes) == [0, 0, 4]


def test_broken_catalogs_of_the_system_are_named_and_left_out(tmp_path):
    install(tmp_path, "de", "a", MANY)
    broken = install(tmp_path, "de", "b", [("one more", "noch eins")])
    os.truncate(broken, 40)
    with pytest.warns(UserWarning, match=rf"left out: {broken}: 2 messages do not fit"):
        assert len(all_of(tmp_path)) == 300


def test_bad_arguments(tmp_path):
    install(tmp_path, "de", "a", MANY)
    for languages in ("de", "de-fr", "en-en", "-de", ""):
        with pytest.raises(ValueError, match="one of them 'en', for instance 'en-de'"):
            load(tmp_path, languages=languages)
    with pytest.raises(ValueError, match="a language is letters"):
        load(tmp_path, languages="en-../../etc")
    with pytest.raises(ValueError, match="split 'dev' is not one of"):
        load(tmp_path, "dev")
    with pytest.raises(
        FileNotFoundError, match=r"0 messages in 'en' and 'sv' under (.|\n)*apt-get"
    ):
        load(tmp_path, languages="en-sv")
    with pytest.raises(FileNotFoundError, match=r"300 messages .* at least 301 were expected"):
        load(tmp_path, at_least=301)


def test_catalogs_of_this_machine():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pairs = load_translations("en-de", "test")
        except FileNotFoundError as error:
            pytest.skip(f"few catalogs on this machine: {str(error)[:60]}")
    assert len(pairs) >= 50
    assert all(source.strip() == source and source for source in pairs.sources)
    german = sum("der " in text or "die " in text or "nicht" in text for text in pairs.targets)
    assert german > len(pairs) / 20
