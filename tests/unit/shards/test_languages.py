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
        *[("zh-TW", "Chinese"), ("zh-Hant-HK", "Cantonese"), ("cmn_hant_tw", "Chinese"), ("zho", "Chinese")],
        *[("Mandarin", "Chinese"), ("Mandarin Chinese", "Chinese"), ("Cantonese Chinese", "Cantonese")],
        *[("Farsi", "Persian"), ("Tagalog", "Filipino"), ("Bahasa Indonesia", "Indonesian"), ("zsm", "Malay")],
    ],
)
def test_codes_of_corpora_mean_the_language(code, name):
    assert language_name(code) == name


# The codes of the 30 languages in FLEURS and in Common Voice, as these corpora name their folders.
FLEURS = (
    "cmn_hans_cn en_us yue_hant_hk ar_eg de_de fr_fr es_419 pt_br id_id it_it ko_kr ru_ru th_th vi_vn ja_jp tr_tr "
    "hi_in ms_my nl_nl sv_se da_dk fi_fi pl_pl cs_cz fil_ph fa_ir el_gr ro_ro hu_hu mk_mk"
)
COMMON_VOICE = "zh-CN en yue ar de fr es pt id it ko ru th vi ja tr hi ms nl sv-SE da fi pl cs tl fa el ro hu mk"


@pytest.mark.parametrize("codes", [FLEURS, COMMON_VOICE])
def test_corpora_name_each_of_the_thirty(codes):
    assert [language_name(code) for code in codes.split()] == list(LANGUAGES)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_nothing_means_that_the_language_is_not_known(value):
    assert language_name(value) is None


@pytest.mark.parametrize(
    "value", ["en+zh", "klingon", "no", "nb", "nb_no", "nan-tw", "sw_ke", "english accent", "eng lish", "x_en"]
)
def test_an_unknown_language_is_refused_by_name(value):
    with pytest.raises(SourceError, match="language must be one of Chinese, English") as raised:
        language_name(value)
    assert repr(value) in str(raised.value)
