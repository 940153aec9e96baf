import pytest

from shards.errors import SourceError
from shards.languages import LANGUAGES, language_name


def test_there_are_the_thirty_languages_of_the_model():
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 30


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_name_is_known_in_any_case(name):
    assert [language_name(value) for value in (name, name.lower(), name.upper(), f" {name} ")] == [name] * 4


@pytest.mark.parametrize(
    ("code", "name"),
    [
        *[("en", "English"), ("vi", "Vietnamese"), ("vi_vn", "Vietnamese"), ("vi-VN", "Vietnamese"), ("zh", "Chinese")],
        *[("cmn_hans_cn", "Chinese"), ("zh-CN", "Chinese"), ("zh-HK", "Cantonese"), ("yue", "Cantonese")],
        *[("yue_hant_hk", "Cantonese"), ("fil", "Filipino"), ("fil_ph", "Filipino"), ("tl", "Filipino")],
        *[("pt-BR", "Portuguese"), ("es_419", "Spanish"), ("fa", "Persian"), ("el_gr", "Greek"), ("mk", "Macedonian")],
        *[("ms_my", "Malay"), ("id", "Indonesian"), ("de", "German"), ("nl", "Dutch"), ("da", "Danish")],
    ],
)
def test_codes_of_corpora_mean_the_language(code, name):
    assert language_name(code) == name


@pytest.mark.parametrize("value", [None, "", "  "])
def test_nothing_means_that_the_language_is_not_known(value):
    assert language_name(value) is None


@pytest.mark.parametrize("value", ["en+zh", "klingon", "no", "english accent", "eng lish", "x_en"])
def test_an_unknown_language_is_refused_by_name(value):
    with pytest.raises(SourceError, match="language must be one of Chinese, English") as raised:
        language_name(value)
    assert repr(value) in str(raised.value)
