import gzip
import os
import sys
from pathlib import Path

import pytest

from shards.errors import SourceError
from shards.places import Place, without_queries
from shards.sources import read_found
from tests.helpers.corpora import make_shar, make_vivos, write_lines
from tests.helpers.serving import Served, serve


@pytest.fixture
def web(tmp_path):
    """A server of ``tmp_path / "web"``."""
    (tmp_path / "web").mkdir()
    with serve(tmp_path / "web") as served:
        yield served


def fill(folder: Path) -> Path:
    for name in ("b.txt", "a/2.wav", "a/10 ä#%.wav", "a/sub/x?.flac", ".hidden", "a/.git/x.wav"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return folder


@pytest.mark.parametrize("text", ["http://host/a", "HTTPS://host/a", "s3://bucket/a/b", "http://[::1]:8000/a"])
def test_three_schemes_are_addresses(text):
    place = Place.of(text)

    assert place.is_remote
    assert place.url.partition("://")[0] in ("http", "https", "s3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[(text, "must be a path or an address, got") for text in ("pipe:cat x", "cat x |", "a\0b", "", "memory:x")],
        *[(text, "must be a path or an address, got") for text in ("file:///x", "hf://datasets/x", "data:,x")],
        *[(text, "must begin with one of http, https, s3") for text in ("gs://b/x", "ftp://host/x")],
        *[(text, "must .*hold no '::'") for text in ("https://host/a.zip::x", "s3://b/a::c")],
        *[(text, "must name a host or bucket") for text in ("http:///x", "s3://", "https://user:secret@host/x")],
    ],
)
def test_all_else_is_refused_by_name(text, message):
    with pytest.raises(SourceError, match=message) as raised:
        Place.of(text)

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("text", ["a/b.wav", "/a b/ä.wav", "a:b", "c::d", "~/x", "{a..b}", "$HOME/x", "a?b#c"])
def test_everything_else_is_a_path_and_nothing_in_it_is_expanded(text):
    assert (Place.of(text).is_remote, Place.of(text).url) == (False, text)


@pytest.mark.parametrize(
    ("text", "name", "stem", "suffix", "parent"),
    [
        ("/a/b.tar", "b.tar", "b", ".tar", "/a"),
        ("/a/c.JSONL.gz", "c.JSONL.gz", "c", ".jsonl.gz", "/a"),
        ("https://host/a%20b/c.d.jsonl?x=1", "c.d.jsonl", "c.d", ".jsonl", "https://host/a%20b"),
        ("https://host/a%20b/", "a b", "a b", "", "https://host"),
        ("s3://bucket/a/b%20c", "b%20c", "b%20c", "", "s3://bucket/a"),
        ("s3://bucket", "bucket", "bucket", "", "s3://bucket"),
    ],
)
def test_parts_of_names_are_those_of_paths(text, name, stem, suffix, parent):
    place = Place.of(text)

    assert (place.name, place.stem, place.suffix, place.parent.url) == (name, stem, suffix, parent)


@pytest.mark.parametrize(
    ("root", "relative", "child"),
    [
        ("/a", "b/c", "/a/b/c"),
        ("/a", "/b/c", "/b/c"),
        ("/a", "../b", "/a/../b"),
        ("/a", "https://host/b", "https://host/b"),
        ("https://host/a", "b/../c d#.wav", "https://host/a/c%20d%23.wav"),
        ("https://host/a/", "%2e%2e/b", "https://host/a/%252e%252e/b"),
        ("s3://bucket/a", "b c%20.wav", "s3://bucket/a/b c%20.wav"),
    ],
)
def test_a_child_is_relative_to_its_folder(root, relative, child):
    assert Place.of(root).child(relative).url == child


@pytest.mark.parametrize("relative", ["/etc/passwd", "../b", "a/../../b", "https://other/b", "s3://b/c", "file:///x"])
@pytest.mark.parametrize("root", ["https://host/a", "s3://bucket/a"])
def test_what_a_remote_manifest_names_stays_below_it(root, relative):
    with pytest.raises(SourceError, match=r"must (lead to something below|be a path or an address)"):
        Place.of(root).child(relative)


def test_an_address_with_a_query_has_no_children():
    with pytest.raises(SourceError, match=r"must lead to something below https://host/a\?token=1"):
        Place.of("https://host/a?token=1").child("b")


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_folder_is_walked_alike_here_and_behind_an_address(tmp_path, web, is_remote):
    place = Place.of(web.url if is_remote else str(tmp_path / "web"))
    fill(tmp_path / "web")

    assert place.walk() == ["a/10 ä#%.wav", "a/2.wav", "a/sub/x?.flac", "b.txt"]
    assert (place.names(), place.folders()) == (["a", "b.txt"], ["a"])
    for name in place.walk():
        with place.child(name).open() as file:
            assert file.read().decode() == f"content of {name}"


@pytest.mark.parametrize("is_remote", [False, True])
def test_files_and_folders_are_told_apart(tmp_path, web, is_remote):
    root = Place.of(web.url if is_remote else str(tmp_path / "web"))
    fill(tmp_path / "web")

    found = [(place.is_file(), place.is_folder(), place.exists()) for place in map(root.child, ("b.txt", "a", "none"))]

    assert found == [(True, False, True), (False, True, True), (False, False, False)]


def test_a_page_cannot_lead_out_of_its_folder(tmp_path, web):
    (tmp_path / "web" / "in").mkdir()
    links = [
        "x.wav",
        "../b.txt",
        "/b.txt",
        "http://other/y.wav",
        "%2e%2e/b.txt",
        "?C=N;O=D",
        "a/b.wav",
        "//other/z.wav",
    ]
    page = "".join(f'<a href="{link}">x</a>' for link in links)
    (tmp_path / "web" / "in" / "index.html").write_text(page)

    assert Place.of(f"{web.url}/in").walk() == ["x.wav"]


def test_a_folder_that_links_to_itself_is_not_walked_for_ever(tmp_path, web, monkeypatch):
    monkeypatch.setattr("shards.places._MAX_DEPTH", 3)
    monkeypatch.setattr(Place, "_list_remote", lambda self: [("loop", True)])

    with pytest.raises(SourceError, match=r"must hold folders at most 3 deep, got more; is it a loop"):
        Place.of(web.url).walk()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / "x")

    with pytest.raises(SourceError, match=r"x' must be readable, got .*mend the path or its permissions"):
        Place.of(str(tmp_path / "x")).open()


@pytest.mark.parametrize("knows_ranges", [False, True])
def test_a_remote_file_is_read_from_its_beginning_whatever_the_server_knows(tmp_path, web, knows_ranges):
    web.knows_ranges = knows_ranges
    data = os.urandom(12_000_000)  # more than fsspec asks for at once
    (tmp_path / "web" / "x.bin").write_bytes(data)

    with Place.of(f"{web.url}/x.bin").open(is_read_once=True) as file:
        assert file.read() == data


def test_a_remote_file_can_be_read_by_offset(tmp_path, web):
    data = os.urandom(300_000)
    (tmp_path / "web" / "x.bin").write_bytes(data)

    with Place.of(f"{web.url}/x.bin").open() as file:
        assert file.seek(0, os.SEEK_END) == len(data)
        assert [(file.seek(start), file.read(100)) for start in (250_000, 7)] == [
            (start, data[start : start + 100]) for start in (250_000, 7)
        ]


def test_a_remote_file_of_which_only_a_part_comes_is_an_error_of_reading(tmp_path, web):
    (tmp_path / "web" / "x.bin").write_bytes(os.urandom(300_000))
    web.cut = {"/x.bin"}

    with Place.of(f"{web.url}/x.bin").open(is_read_once=True) as file, pytest.raises(OSError, match=r"payload"):
        file.read()


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, r"got '403"), (500, r"got '500"), (404, r"got '404.*mend the address or the credentials")],
)
def test_what_a_server_refuses_is_told(tmp_path, web, status, message):
    (tmp_path / "web" / "x.bin").write_bytes(b"x")
    web.statuses = {"/x.bin": status}

    with pytest.raises(SourceError, match=rf"x\.bin' must be readable, {message}"):
        Place.of(f"{web.url}/x.bin").open()


def test_a_server_that_forbids_is_not_one_where_nothing_is(tmp_path, web):
    (tmp_path / "web" / "x.bin").write_bytes(b"x")
    web.statuses = {"/x.bin": 403}

    with pytest.raises(SourceError, match=r"must be readable, got '403"):
        Place.of(f"{web.url}/x.bin").exists()


def test_a_server_that_is_not_there_is_an_error(tmp_path):
    with serve(tmp_path) as served:
        pass

    with pytest.raises(SourceError, match=r"must be readable, got .*[Cc]onnect"):
        Place.of(f"{served.url}/x").exists()


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_lines_are_numbered_and_unpacked(tmp_path, web, name, is_remote):
    web.knows_ranges = False
    write_lines(tmp_path / "web" / name, "one", "", "zwei")

    place = Place.of(web.url if is_remote else str(tmp_path / "web")).child(name)

    assert list(place.lines()) == [(1, b"one\n"), (2, b"\n"), (3, b"zwei\n")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"a\n" + b"b" * 101, r"x\.txt:2 must be shorter than 100 bytes"),
        ("x.gz", gzip.compress(b"a\n" + b"b" * 10_000_000, mtime=0), r"x\.gz:2 must be shorter than 100 bytes"),
        ("x.gz", gzip.compress(b"a\n" * 9, mtime=0)[:-4], r"x\.gz:\d+ must be readable"),
        ("x.gz", b"a\n", r"x\.gz:1 must be readable"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)

    with pytest.raises(SourceError, match=message):
        list(Place.of(str(tmp_path / name)).lines(max_bytes=100))


def test_a_file_that_changed_has_another_state(tmp_path, web):
    path = tmp_path / "web" / "x"
    places = [Place.of(str(path)), Place.of(f"{web.url}/x")]
    path.write_bytes(b"a")
    before = [place.state() for place in places]
    again = [place.state() for place in places]
    path.write_bytes(b"bc")

    assert before == again
    assert all(place.state() != state for place, state in zip(places, before, strict=True))


@pytest.mark.parametrize(("package", "url"), [("aiohttp", "http://127.0.0.1:9/x"), ("s3fs", "s3://bucket/x")])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(monkeypatch, package, url):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(
        SourceError, match=rf"must be read with the packages .*{package}.*pip install 'qad-dist\[remote\]'"
    ):
        Place.of(url).exists()


def test_nothing_remote_is_imported_for_local_places(tmp_path):
    code = (
        "import sys; from shards.places import Place; Place.of(sys.argv[1]).walk();"
        "assert not {'fsspec', 'aiohttp', 's3fs'} & set(sys.modules)"
    )

    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(tmp_path)]) == 0


@pytest.mark.parametrize("make", [make_vivos, make_shar])
def test_a_corpus_behind_an_address_is_read_as_here(tmp_path, web: Served, make):
    folder = make(tmp_path / "web" / "my corpus")

    here, there = (
        [
            (
                one.name,
                one.offset_bytes,
                one.num_bytes,
                one.told_seconds,
                one.speaker,
                one.reference,
                one.split,
                one.source,
            )
            for one in read_found([place], default_language=None, spool=tmp_path)
        ]
        for place in (str(folder), f"{web.url}/my%20corpus")
    )

    assert here == there


def test_a_remote_manifest_names_audio_beside_it(tmp_path, web):
    write_lines(tmp_path / "web" / "set" / "m.jsonl", {"audio": "a b.wav"}, {"audio": "../x.wav"})

    found = read_found([f"{web.url}/set/m.jsonl"], default_language=None, spool=tmp_path)

    assert next(found).path == f"{web.url}/set/a%20b.wav"
    with pytest.raises(SourceError, match=r"m\.jsonl:2: a path must lead to something below .*/set, got '\.\./x\.wav'"):
        next(found)


def test_what_people_see_of_an_address_is_without_its_signature():
    text = "http://host/a.tar?X-Signature=0123&b must be, got 'S3://bucket/b?c=1'; is this a question? no"

    assert without_queries(text) == "http://host/a.tar?... must be, got 'S3://bucket/b?...'; is this a question? no"
