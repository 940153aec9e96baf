import json
from pathlib import Path

import pytest

from qad_dist.text.predictions import Prediction, prediction_line, read_predictions
from shards.errors import SourceError

# As the Open ASR Leaderboard's own code writes it.
MANIFEST = Path(__file__).parents[2] / "assets" / "open_asr" / "manifest.jsonl"


def written(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def test_lines_are_the_leaderboards_byte_for_byte() -> None:
    rows = [
        ("sample_0", "Café naïve résumé señor", "cafe naive resume senor", "accents"),
        ("pair-1.flac", "tabs\tand\nlines\u00a0and  spaces", "tabs and lines and spaces", "symbols"),
        ("pair-2.flac", "I won't go, and you can't make me.", "i will not go and you cannot make me", "contractions"),
        ("pair-3.flac", "", "", "empty"),
    ]

    lines = [
        prediction_line(
            audio_filepath=name, duration=1.5 + i, time=0.25, text=text, pred_text=pred_text, extra={"kind": kind}
        )
        for i, (name, text, pred_text, kind) in enumerate(rows)
    ]

    assert "".join(f"{line}\n" for line in lines).encode() == MANIFEST.read_bytes()


def test_a_line_says_null_where_no_time_is_known() -> None:
    line = prediction_line(audio_filepath="a.flac", duration=None, text="yes", pred_text="no")

    assert line == '{"audio_filepath": "a.flac", "duration": null, "time": null, "text": "yes", "pred_text": "no"}'


def test_a_further_field_may_not_hide_one_of_the_leaderboards() -> None:
    with pytest.raises(ValueError, match=r"extra must have fields of its own, got pred_text, time; rename them"):
        prediction_line(
            audio_filepath="a", duration=1, text="", pred_text="", extra={"time": 1, "pred_text": "", "k": 1}
        )


def test_a_line_holds_no_number_that_json_does_not_know() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        prediction_line(audio_filepath="a", duration=float("nan"), text="", pred_text="")


def test_the_leaderboards_file_is_read_with_names_of_audio_files_as_keys() -> None:
    found = read_predictions(MANIFEST)

    assert list(found) == ["sample_0", "pair-1", "pair-2", "pair-3"]
    assert found["pair-1"] == Prediction(
        key="pair-1",
        text="tabs and lines and spaces",
        reference="tabs\tand\nlines\u00a0and  spaces",
        audio_name="pair-1.flac",
        language=None,
        detected_language=None,
        extra={"duration": 2.5, "time": 0.25, "kind": "symbols"},
    )
    assert found["pair-3"].text == found["pair-3"].reference == ""


def test_what_is_written_is_read_with_its_own_key_languages_and_further_fields(tmp_path: Path) -> None:
    extra = {"key": "an-1", "language": "English", "detected_language": "French", "token_ids": [1, 2], "kl": None}
    line = prediction_line(audio_filepath="a/b.wav", duration=1.0, text="Oui. ", pred_text=" Ja\u2028", extra=extra)

    found = read_predictions(written(tmp_path, line, ""))

    assert found == {
        "an-1": Prediction(
            key="an-1",
            text=" Ja\u2028",
            reference="Oui. ",
            audio_name="a/b.wav",
            language="English",
            detected_language="French",
            extra={"duration": 1.0, "time": None, "token_ids": [1, 2], "kl": None},
        )
    }


@pytest.mark.parametrize(
    ("name", "key"),
    [("a/b/an-1.flac", "an-1"), ("1089-134686-0000", "1089-134686-0000"), ("x.y.wav", "x.y"), ("/c.MP3", "c")],
)
def test_the_key_of_a_line_without_one_is_the_audio_files_name(tmp_path: Path, name: str, key: str) -> None:
    line = prediction_line(audio_filepath=name, duration=None, text="", pred_text="")

    assert list(read_predictions(written(tmp_path, line))) == [key]


def test_a_line_with_a_key_needs_no_audio_file(tmp_path: Path) -> None:
    (found,) = read_predictions(written(tmp_path, '{"key": "k", "text": "a", "pred_text": "b"}')).values()

    assert (found.key, found.audio_name, dict(found.extra)) == ("k", None, {})


GOOD = '{"audio_filepath": "a.wav", "text": "yes", "pred_text": "no"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2 must be a JSON object in UTF-8, got .*; mend the line"),
        ("[1]", r":2 must be a JSON object, got list; mend the line"),
        (b'{"text": "\xff"}', r":2 must be a JSON object in UTF-8, got .*0xff.*; mend the line"),
        ('{"key": "b", "text": "yes"}', r":2 must have the field pred_text, got none; add it, with an empty text"),
        ('{"key": "b", "pred_text": "yes"}', r":2 must have the field text, got none; add it"),
        ('{"key": "b", "text": "", "pred_text": null}', r":2 must have the field pred_text, got none"),
        ('{"key": "b", "text": "", "pred_text": 7}', r":2: pred_text must be text, got 7; mend the line"),
        ('{"key": 3, "text": "", "pred_text": ""}', r":2: key must be text, got 3"),
        ('{"key": "b", "text": "", "pred_text": "", "language": ["English"]}', r":2: language must be text, got \["),
        ('{"key": "b", "text": "", "pred_text": "\\ud800"}', r":2: pred_text must be valid Unicode, got half a surr"),
        ('{"text": "", "pred_text": ""}', r":2 must have the field key or the name of a file in audio_filepath"),
        ('{"audio_filepath": "a/", "text": "", "pred_text": ""}', r":2 must have the field key or the name of a file"),
        (GOOD, r":2: key must be there once, got 'a' again after .*predictions.jsonl:1; remove one of the lines"),
        ('{"key": "a", "text": "", "pred_text": ""}', r":2: key must be there once, got 'a' again"),
        (json.dumps({"key": "b", "text": "", "pred_text": "y" * 1_000_000}), r":2 must be shorter than 1000000 bytes"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_the_remedy(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = written(tmp_path, GOOD, line)

    with pytest.raises(SourceError, match=r"predictions\.jsonl" + message):
        read_predictions(path)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_predictions_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(SourceError, match=r"predictions.jsonl must hold predictions, got none; is it the right file"):
        read_predictions(written(tmp_path, *lines))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none.jsonl' must be readable, got 'No such file"):
        read_predictions(tmp_path / "none.jsonl")
