import re
import tarfile

import pytest

from shards.sources.keys import MAX_KEY_LENGTH, clean_key, piece_key, suffixed_key


@pytest.mark.parametrize(
    "name", ["a.b.wav", "../../etc/passwd", "Ä/ö", "语音", "x\n y", "-", "", "a" * 300, "b/" * 200, "a__0001", "_" * 9]
)
def test_keys_have_only_what_tars_and_webdataset_bear(name):
    key = clean_key(name)

    assert key
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    assert len(key) <= MAX_KEY_LENGTH


def test_long_names_that_end_alike_keep_different_keys():
    assert clean_key("a" * 300) != clean_key("a" * 301)


@pytest.mark.parametrize(
    "name", ["a__0001", "a_ _0001", "a_._0001", "é__1", "x" * 100 + "__0001", "__0001", "a_-_1__2"]
)
def test_no_key_looks_like_that_of_a_piece(name):
    key = clean_key(name)

    assert "__" not in key
    assert "__" not in suffixed_key(key, "source__0001", name)


def test_pieces_are_named_in_their_order():
    keys = [piece_key("a", number) for number in (0, 1, 10, 9999)]

    assert keys == ["a__0000", "a__0001", "a__0010", "a__9999"]
    assert all(re.fullmatch(r".*__\d+", key) for key in keys)


def test_the_longest_key_fits_the_header_of_a_plain_tar():
    key = piece_key(f"{suffixed_key(clean_key('a' * 300), 'source', 'name')}-99", 43_200)

    name = f"{key}.json"
    header = tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)

    assert header[: len(name)] == name.encode()
    assert len(header) == 512


def test_a_suffix_tells_names_and_sources_apart_and_nothing_else():
    assert suffixed_key("a_b", "one", "a b") == suffixed_key("a_b", "one", "a b")
    assert len({suffixed_key("a_b", source, name) for source in ("one", "two") for name in ("a b", "a_b")}) == 4
    # sha256 of "one/a b", from coreutils.
    assert suffixed_key("a_b", "one", "a b") == "a_b-071e0d5c"
