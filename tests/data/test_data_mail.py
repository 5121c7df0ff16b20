import pytest

from fmjax.data import assets

# Nothing here imports fmjax.data.mail at the top: it brings tensorflow_datasets.

WORDS = "the committee will meet on Friday to talk about the new building and its cost"


def mail(subject, body, headers="", content_type="text/plain; charset=utf-8"):
    head = f"From a@example.org Thu Aug 22\nFrom: A <a@example.org>\nSubject: {subject}\n{headers}"
    return f"{head}Content-Type: {content_type}\n\n{body}\n".encode()


MAILS = {
    "easy-ham-1": [
        mail("[list] Meeting on Friday", f"Hi,\n\n{WORDS},\nsays Ann.\n\n-- \nAnn\n"),
        mail("Re: Meeting on Friday", f"> old\n{WORDS} too"),
        mail("meeting on friday", f"{WORDS} again"),
        mail("Answer without a prefix", WORDS, headers="In-Reply-To: <1@example.org>\n"),
        mail("Too short", "nine words are one too few to be kept"),
        mail("One", f"{WORDS} one"),
        *[mail(f"News number {n}", f"URL: http://a.b\nDate: x\n\n{WORDS} {n}") for n in range(60)],
    ],
    "easy-ham-2": [mail("News number 0", f"{WORDS} 0"), mail("Empty one", "> only\n> quoted")],
    "hard-ham-1": [mail("A page", f"<p>{WORDS}</p>", content_type="text/html")],
    "spam-1": [mail(f"Buy it {n}", f"{WORDS} now {n}!") for n in range(30)],
    "spam-2": [mail("", WORDS)],
}


@pytest.fixture
def small_mail(tmp_path, monkeypatch):
    from fmjax.data import mail as module

    monkeypatch.setenv("FMJAX_HOME", str(tmp_path))
    for group, mails in MAILS.items():
        folder = tmp_path / "assets" / f"mail-{assets.ASSETS['mail'].version}" / group
        folder.mkdir(parents=True)
        for number, content in enumerate(mails):
            (folder / f"{number:05}.{'0' * 32}.txt").write_bytes(content)
    monkeypatch.setattr(module, "MAILS", sum(map(len, MAILS.values())))
    return module


def test_subjects_of_first_mails_of_a_thread(small_mail):
    found = {}
    for split in ("train", "val", "test"):
        pairs = small_mail.load_subjects(split)
        assert len(pairs) > 0
        assert not found.keys() & set(pairs.targets)
        rows = zip(pairs.ids, pairs.sources, strict=True)
        found |= dict(zip(pairs.targets, rows, strict=True))
    assert len(found) == 1 + 60 + 1
    assert found["Meeting on Friday"] == ("easy-ham-1/00000", f"Hi,\n{WORDS}, says Ann.")
    assert found["News number 0"] == ("easy-ham-1/00006", f"{WORDS} 0")
    assert found["A page"] == ("hard-ham-1/00000", WORDS)
    short = [small_mail.load_subjects(split, min_words=9).targets for split in ("train", "val")]
    assert "Too short" in [
        *short[0],
        *short[1],
        *small_mail.load_subjects("test", min_words=9).targets,
    ]


def test_spam(small_mail):
    parts = [small_mail.load_spam(split) for split in ("train", "val", "test")]
    labels = [part.label_names[label] for part in parts for label in part.labels]
    # Without the copy, the mail that is all quotation and the one without a subject.
    assert (labels.count("ham"), labels.count("spam")) == (6 + 60 + 1, 30)
    texts = [text for part in parts for text in part.texts]
    assert f"Buy it 3\n{WORDS} now 3!" in texts
    with pytest.raises(ValueError, match="dev"):
        small_mail.load_spam("dev")


def test_threads_stay_together(small_mail):
    for split in ("train", "val", "test"):
        texts = small_mail.load_spam(split).texts
        thread = [text for text in texts if text.lower().startswith("meeting on friday\n")]
        assert len(thread) in (0, 3)


def test_another_number_of_mails_is_refused(small_mail, monkeypatch):
    monkeypatch.setattr(small_mail, "MAILS", 6046)
    with pytest.raises(ValueError, match="100 mails, but the corpus has 6046"):
        small_mail.load_spam("val")


@pytest.mark.parametrize(
    ("subject", "clean", "is_reply"),
    [
        ("Lunch?", "Lunch?", False),
        ("Re: [ILUG] RE[2]: Fwd: Aw:  Lunch\n at  noon", "Lunch at noon", True),
        ("[a] [b] Lunch", "Lunch", False),
        ("Return of the lunch", "Return of the lunch", False),
        ("Dinner (was Re: Lunch)", "Dinner", False),
        ("FW: x", "x", True),
        ("Re:", "", True),
        ("", "", False),
    ],
)
def test_subjects_are_cleaned(subject, clean, is_reply):
    from fmjax.data.mail import clean_subject

    assert clean_subject(subject) == (clean, is_reply)


@pytest.mark.parametrize(
    ("body", "clean"),
    [
        ("a\nb\n\n\nc  d\n", "a b\nc d"),
        ("a\r\n\r\nb", "a\nb"),
        ("> q\n > q\n| q\nJM> q\na -> b", "a -> b"),
        ("On Monday, Ann Other\n<ann@other.org> wrote:\n> q\nyes", "yes"),
        ("Ann writes:\n\n> q\n\nno\nshe wrote: it", "no she wrote: it"),
        ("a\n-- \nAnn", "a"),
        ("a\n--\nAnn", "a"),
        ("a -- b", "a -- b"),
        ("a\n-----Original Message-----\nFrom: b", "a"),
        ("a\n--- begin forwarded text\nb", "a"),
        ("a\n" + "_" * 47 + "\nlist", "a"),
        ("=" * 60 + "\nnews\n" + "=" * 60 + "\nmore", "news"),
        ("URL: http://a.b\nDate: today\n\nnews", "news"),
        (
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\na\n-----BEGIN PGP SIGNATURE-----\nx",
            "a",
        ),
        ("a\nTo unsubscribe from this, do b", "a"),
        ("a\nhttp://lists.org/mailman/listinfo/list", "a"),
        (
            "see http://lists.org/mailman/listinfo/list",
            "see http://lists.org/mailman/listinfo/list",
        ),
        ("> all\n> quoted", ""),
    ],
)
def test_bodies_are_cleaned(body, clean):
    from fmjax.data.mail import clean_body

    assert clean_body(body) == clean


def read(tmp_path, content):
    from fmjax.data.mail import read_mail

    path = tmp_path / "group" / "00007.abc.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return read_mail(path)


def test_encodings_of_mails(tmp_path):
    quoted = read(
        tmp_path,
        b"Subject: =?iso-8859-1?Q?Caf=E9?= =?utf-8?B?4oKs?= now\n"
        b"Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable"
        b"\n\nna=EFve=\n text",
    )
    assert quoted == ("group/00007", "Café€ now", "naïve text", False)
    # Bytes that say nothing of their encoding, and an encoding that nobody knows.
    raw = read(tmp_path, b"Subject: caf\xe9\nContent-Type: text/plain; charset=x-none\n\nna\xefve")
    assert (raw.subject, raw.body) == ("café", "naïve")
    wrong = read(tmp_path, b"Subject: =?utf-8?B?x?= y\nReferences: <1>\n\n\xff\xfe")
    assert wrong.subject == "=?utf-8?B?x?= y"
    assert wrong.is_reply
    assert read(tmp_path, b"no header at all").subject == ""


def test_parts_of_mails(tmp_path):
    head = b"Subject: s\nContent-Type: multipart/mixed; boundary=X\n\n"
    attached = b"--X\nContent-Disposition: attachment; filename=a.txt\n\nattached\n"
    page = (
        b"--X\nContent-Type: text/html\n\n<head><title>t</title><style>s</style></head>"
        b"<body>One &amp; <b>two</b><br>three<script>x</script><p>four\n  five</body>\n"
    )
    plain = b"--X\nContent-Type: text/plain\n\nplain\n"
    assert read(tmp_path, head + attached + page + plain + b"--X--\n").body == "plain"
    assert read(tmp_path, head + attached + page + b"--X--\n").body == "One & two\nthree\nfour five"
    assert read(tmp_path, head + attached + b"--X--\n").body == ""


@pytest.mark.asset
def test_the_real_mails():
    from fmjax.data.mail import GROUPS, read_mail

    if not assets.available("mail"):
        pytest.skip("the asset mail is not cached: fmjax.data.fetch('mail')")
    folder = assets.fetch("mail")
    counts = {group: len(list((folder / group).glob("*.txt"))) for group in GROUPS}
    assert list(counts.values()) == [2500, 1400, 250, 500, 1396]
    # Reading all takes a quarter of a minute; every tenth covers each kind of mail.
    paths = [path for group in GROUPS for path in sorted((folder / group).glob("*.txt"))][::10]
    mails = [read_mail(path) for path in paths]
    assert sum(mail.is_reply for mail in mails) == 251
    assert sum(not mail.body for mail in mails) <= 12
    assert not any(line.startswith(">") for mail in mails for line in mail.body.splitlines())
