import pytest

from fmjax.data import assets

# Nothing here imports fmjax.data.wordnet at the top: it brings tensorflow_datasets.

LICENCE = "  1 This software and database is provided | as is.  \n  2 So it is.  \n"
FILES = {
    "noun": [
        "00000001 03 n 02 dog 0 domestic_dog 0 001 @ 00000002 n 0000 | a pet; "
        '"the dog barked all night"; "go, dog!"  ',
        "00000002 05 n 01 cat 0 000 | a pet  ",
        "00000003 06 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | ten letters  ",
    ],
    "verb": ['00000001 38 v 01 go_off 0 000 01 + 02 00 | run away; "he went off"  '],
    "adj": [
        '00000001 00 s 02 afloat(p) 0 awash(ip) 0 000 | borne on water; "boats afloat"',
        "00000002 44 a 01 (a) 0 000 | odd",
    ],
    "adv": [f"{n:08} 02 r 01 quickly{n} 0 000 | with speed {n}" for n in range(40)],
}


@pytest.fixture
def small_wordnet(tmp_path, monkeypatch):
    from fmjax.data import wordnet

    monkeypatch.setenv("FMJAX_HOME", str(tmp_path))
    folder = tmp_path / "assets" / f"wordnet-{assets.ASSETS['wordnet'].version}"
    folder.mkdir(parents=True)
    for name, lines in FILES.items():
        (folder / f"data.{name}").write_text(LICENCE + "\n".join(lines) + "\n")
    monkeypatch.setattr(wordnet, "SYNSETS", sum(map(len, FILES.values())))
    return wordnet


def test_glosses_domains_and_entries(small_wordnet):
    pairs, domains, entries = {}, {}, {}
    for split in ("train", "val", "test"):
        glosses = small_wordnet.load_glosses(split)
        rows = zip(glosses.sources, glosses.targets, strict=True)
        pairs |= dict(zip(glosses.ids, rows, strict=True))
        labelled = small_wordnet.load_domains(split)
        named = [labelled.label_names[label] for label in labelled.labels]
        domains |= dict(zip(labelled.ids, named, strict=True))
        documents = small_wordnet.load_entries(split)
        entries |= dict(zip(documents.names, documents.texts, strict=True))
        assert glosses.ids == labelled.ids == documents.names
        # The same definition is in the same split.
        assert ("n00000001" in glosses.ids) == ("n00000002" in glosses.ids)
        assert len(glosses) > 0
    assert len(pairs) == len(domains) == len(entries) == 46
    assert pairs["n00000001"] == ("dog, domestic dog", "a pet")
    assert pairs["a00000001"] == ("afloat, awash", "borne on water")
    assert domains["n00000002"] == "noun.animal"
    assert domains["a00000002"] == "adj.ppl"
    assert entries["n00000001"] == "dog, domestic dog: a pet. the dog barked all night. go, dog!"
    assert entries["v00000001"] == "go off: run away. he went off."
    parts = small_wordnet.load_domains("train", label="part_of_speech")
    assert parts.label_names == ("noun", "verb", "adj", "adv")
    firsts = small_wordnet.load_glosses("train", lemmas="first")
    assert "a" in firsts.sources
    assert not any("," in source for source in firsts.sources)


def test_unknown_names(small_wordnet):
    with pytest.raises(ValueError, match="dev"):
        small_wordnet.load_glosses("dev")
    with pytest.raises(ValueError, match="lemmas 'last' is not one of"):
        small_wordnet.load_glosses("val", lemmas="last")
    with pytest.raises(ValueError, match="label 'genre' is not one of"):
        small_wordnet.load_domains("val", label="genre")


def test_another_number_of_synsets_is_refused(small_wordnet, monkeypatch):
    monkeypatch.setattr(small_wordnet, "SYNSETS", 47)
    with pytest.raises(ValueError, match=r"46 synsets, but WordNet 3\.0 has 47"):
        small_wordnet.load_glosses("val")


def test_every_wrong_line_is_named(tmp_path):
    from fmjax.data.wordnet import read_synsets

    lines = [
        "00000001 03 n 01 dog 0 000 | fine",
        "00000001 03 n 01 dog 0 000",
        "0000001 03 n 01 dog 0 000 | seven digits",
        "00000001 45 n 01 dog 0 000 | a domain too many",
        "00000001 03 v 01 dog 0 000 | a verb",
        "00000001 03 n 00 000 | no word",
        "00000001 03 n 01 dog 0 000 |  ",
        "no",
    ]
    path = tmp_path / "data.noun"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="7 problems") as error:
        read_synsets(path)
    for number in range(2, 9):
        assert f"line {number}: not a synset of this file" in str(error.value)


@pytest.mark.parametrize(
    ("gloss", "definition", "examples"),
    [
        ("alone", "alone", []),
        ("one; two; ", "one; two", []),
        ('one; two; "three"; "four, five"', "one; two", ["three", "four, five"]),
        ('one: "two"', "one", ["two"]),
        ('one (e.g., "two")', 'one (e.g., "two")', []),
        ('as in "one"; "two"', 'as in "one"', ["two"]),
        ('one; "two"- H. Miller; "three" or "four"', "one", ["two", "three", "four"]),
        ('one; "two"; "three', "one", ["two", "three"]),
        ('one; "two;"; ""', "one", ["two"]),
    ],
)
def test_glosses_are_split(gloss, definition, examples):
    from fmjax.data.wordnet import split_gloss

    assert split_gloss(gloss) == (definition, examples)


@pytest.mark.asset
def test_the_real_wordnet():
    from fmjax.data.splits import hash_split
    from fmjax.data.wordnet import DOMAINS, PARTS_OF_SPEECH, read_synsets

    if not assets.available("wordnet"):
        pytest.skip("the asset wordnet is not cached: fmjax.data.fetch('wordnet')")
    folder = assets.fetch("wordnet")
    parts = {name: read_synsets(folder / f"data.{name}") for name in PARTS_OF_SPEECH}
    counts = {name: len(part) for name, part in parts.items()}
    assert counts == {"noun": 82_115, "verb": 13_767, "adj": 18_156, "adv": 3_621}
    synsets = [synset for part in parts.values() for synset in part]
    assert len({synset.id for synset in synsets}) == len(synsets) == 117_659
    assert sum(len(synset.lemmas) for synset in synsets) == 206_978
    assert sum(len(synset.examples) for synset in synsets) == 48_325
    assert {synset.domain for synset in synsets} == set(DOMAINS)
    assert len(DOMAINS) == 45
    splits = [hash_split(f"wordnet/{synset.definition.lower()}") for synset in synsets]
    assert [splits.count(split) for split in ("train", "val", "test")] == [94_223, 11_796, 11_640]
