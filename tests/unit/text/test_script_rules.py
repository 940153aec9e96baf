"""Each rule with the words that its source gives, and words of the same letters that it must leave alone."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qad_dist.text.normalize import characters, normalize
from qad_dist.text.script_rules import LETTERS, fold_case, one_spelling
from shards.languages import LANGUAGES


def spelt(text: str, language: str | None) -> str:
    return unicodedata.normalize("NFC", one_spelling(text, language))


# Decision 1989/QĐ-BGDĐT of 2018, article 8, in its own spelling; the same words in old style.
MINISTRY = "mái nhà, hoà nhạc, quý hoá, thuỷ thủ, mạnh khoẻ, trí tuệ; bìa, lụa, lửa; biển, thuyền, nhuộm, được"
OLD_STYLE = "mái nhà, hòa nhạc, quý hóa, thủy thủ, mạnh khỏe, trí tuệ; bìa, lụa, lửa; biển, thuyền, nhuộm, được"


YEHS_WITH_HAMZA = ("\u0626", "\u064a\u0654", "\u06cc\u0654", "\u0649\u0654")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("text", [MINISTRY, OLD_STYLE, OLD_STYLE.upper()])
def test_vietnamese_tones_stand_where_the_ministry_puts_them(text: str, form: str) -> None:
    expected = MINISTRY.replace(",", "").replace(";", "")

    assert normalize(unicodedata.normalize(form, text), "Vietnamese") == unicodedata.normalize("NFC", expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("tòa", "toà"), ("tóa", "toá"), ("tỏa", "toả"), ("tõa", "toã"), ("tọa", "toạ")),
        *(("xòe", "xoè"), ("xóe", "xoé"), ("xỏe", "xoẻ"), ("xõe", "xoẽ"), ("xọe", "xoẹ")),
        *(("tùy", "tuỳ"), ("túy", "tuý"), ("tủy", "tuỷ"), ("tũy", "tuỹ"), ("tụy", "tuỵ")),
    ],
)
def test_vietnamese_moves_all_five_tones(old: str, new: str) -> None:
    # The same as viet_text_tools 0.1.6 writes, by normalize_diacritics(new_style=True).
    assert spelt(old, "Vietnamese") == new


@pytest.mark.parametrize("word", ["quý", "qúy", "mùa", "của", "khuỷu", "hoài", "hòan", "óa1", "thuở", "ngoằn"])
def test_vietnamese_leaves_other_syllables_alone(word: str) -> None:
    assert spelt(word, "Vietnamese") == word


def test_vietnamese_tones_move_also_where_an_invisible_character_parts_letter_and_mark() -> None:
    assert normalize("ho\u200d\u0300a", "Vietnamese") == "hoà"


def test_tones_move_in_vietnamese_only() -> None:
    assert normalize("Lisbóa", "Portuguese") == "lisbóa"


@pytest.mark.parametrize("text", ["Bucureşti, Constanţa", "Bucures\u0327ti, Constant\u0327a", "BUCUREŞTI CONSTANŢA"])
def test_romanian_writes_comma_below_for_cedilla(text: str) -> None:
    # The names of U+0219 and U+021B say that they have a comma below.
    expected = "bucure\N{LATIN SMALL LETTER S WITH COMMA BELOW}ti constan\N{LATIN SMALL LETTER T WITH COMMA BELOW}a"

    assert normalize(text, "Romanian") == expected


def test_cedilla_stays_in_turkish() -> None:
    assert normalize("Şişli", "Turkish") == "şişli"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_russian_yo_is_ye_and_short_i_stays(form: str) -> None:
    # Words with yo of the handbook of 2006, section 4; a word with short i.
    text = unicodedata.normalize(form, "Ёлка, ребёнок, лёгкий; мой")

    assert normalize(text, "Russian") == "елка ребенок легкий мой"


def test_russian_yo_with_a_stress_mark_keeps_the_stress() -> None:
    assert normalize("тёмно-кра\u0301сный, трё\u0301х", "Russian") == "темно кра\u0301сный тре\u0301х"


def test_yo_is_a_letter_where_the_language_is_not_russian() -> None:
    assert normalize("ёлка", None) == "ёлка"


@pytest.mark.parametrize(
    ("text", "expected"), [("Cœur, ŒUVRE, œufs", "coeur oeuvre oeufs"), ("Lætitia, ex æquo", "laetitia ex aequo")]
)
def test_french_ligatures_are_two_letters(text: str, expected: str) -> None:
    assert normalize(text, "French") == expected


def test_ligatures_are_letters_in_danish() -> None:
    assert normalize("Ærø", "Danish") == "ærø"


def test_the_mark_on_a_french_ligature_composes_with_its_second_letter() -> None:
    assert normalize("œ\u0301", "French") == "oé"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # As Arabic keyboards write "book" and "Persian"; the right letters by ISIRI 6219 are keheh and Farsi yeh.
        ("\u0643\u062a\u0627\u0628", "\u06a9\u062a\u0627\u0628"),
        ("\u0641\u0627\u0631\u0633\u064a", "\u0641\u0627\u0631\u0633\u06cc"),
        ("\u0645\u0648\u0633\u0649", "\u0645\u0648\u0633\u06cc"),
        # "House of", with the ezafe: U+06C0 is not to be used for Persian.
        ("\u062e\u0627\u0646\u06c0", "\u062e\u0627\u0646\u0647\u0654"),
        ("\u062e\u0627\u0646\u0647\u0654", "\u062e\u0627\u0646\u0647\u0654"),
        ("\u062e\u0627\u0646\u06c2", "\u062e\u0627\u0646\u0647\u0654"),
        # "Here" with the hehs of other keyboards: Urdu twice, Uighur.
        *((f"\u0647\u0645{heh}", "\u0647\u0645\u0647") for heh in "\u06c1\u06be\u06d5"),
        # Presentation forms of both letters, as documents of another age have them.
        ("\ufed9\ufef1", "\u06a9\u06cc"),
        # Yeh with hamza is a letter of Persian too.
        *((f"\u0645\u0633{yeh}\u0644\u0647", "\u0645\u0633\u0626\u0644\u0647") for yeh in YEHS_WITH_HAMZA),
    ],
)
def test_persian_has_its_own_yeh_kaf_and_heh(text: str, expected: str) -> None:
    assert normalize(text, "Persian") == expected


@pytest.mark.parametrize("text", ["كتابي", "على", "كتاب العربية"])
def test_arabic_keeps_its_yeh_kaf_and_alef_maksura(text: str) -> None:
    assert normalize(text, "Arabic") == text


def test_arabic_presentation_forms_are_the_letters() -> None:
    # UnicodeData.txt: U+FEFB is isolated lam with alef, U+FEB3 initial seen, U+FEE1 isolated meem.
    assert normalize("\ufeb3\ufefb\ufee1", "Arabic") == "\u0633\u0644\u0627\u0645"


@pytest.mark.parametrize("language", ["Thai", "English", None])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u0e04\u0e33", ["\u0e04", "\u0e33"]),  # "word": kho khwai, sara am
        ("\u0e04\u0e4d\u0e32", ["\u0e04", "\u0e33"]),  # typed as nikhahit and sara aa
        # "Water": no nu, mai tho, sara am, in the right order, in two parts, with the tone between or behind.
        ("\u0e19\u0e49\u0e33", ["\u0e19", "\u0e49", "\u0e33"]),
        ("\u0e19\u0e49\u0e4d\u0e32", ["\u0e19", "\u0e49", "\u0e33"]),
        ("\u0e19\u0e4d\u0e49\u0e32", ["\u0e19", "\u0e49", "\u0e33"]),
        ("\u0e19\u0e33\u0e49", ["\u0e19", "\u0e49", "\u0e33"]),
        # reorder_vowels("เเปลก") of PyThaiNLP: two sara e become sara ae.
        ("\u0e40\u0e40\u0e1b\u0e25\u0e01", ["\u0e41", "\u0e1b", "\u0e25", "\u0e01"]),
        # "Good" by mai ek and then sara ii; "power" by the killer and then sara i.
        ("\u0e17\u0e48\u0e35", ["\u0e17", "\u0e35", "\u0e48"]),
        ("\u0e2a\u0e34\u0e17\u0e18\u0e4c\u0e34", ["\u0e2a", "\u0e34", "\u0e17", "\u0e18", "\u0e34", "\u0e4c"]),
        ("\u0e01\u0e32\u0e48", ["\u0e01", "\u0e48", "\u0e32"]),
    ],
)
def test_thai_vowels_are_as_pythainlp_writes_them(text: str, expected: list[str], language: str | None) -> None:
    assert characters(text, language) == expected


@pytest.mark.parametrize("text", ["\u0e40\u0e14\u0e47\u0e01\u0e46", "\u0e01\u0e48\u0e2d\u0e19", "\u0e1e\u0e23\u0e30"])
def test_thai_that_is_typed_in_order_stays(text: str) -> None:
    assert normalize(text, "Thai") == text


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("\u0905\u093e", "AA"),
        ("\u0909\u0941", "UU"),
        ("\u090f\u0945", "CANDRA E"),
        ("\u090f\u0947", "AI"),
        ("\u0905\u0949", "CANDRA O"),
        ("\u0906\u0945", "CANDRA O"),
        ("\u0905\u093e\u0945", "CANDRA O"),
        ("\u0905\u094b", "O"),
        ("\u0906\u0947", "O"),
        ("\u0905\u093e\u0947", "O"),
        ("\u0905\u094c", "AU"),
        ("\u0906\u0948", "AU"),
        ("\u0905\u093e\u0948", "AU"),
        ("\u0905\u0945", "CANDRA A"),
    ],
)
def test_devanagari_vowels_that_are_drawn_alike_are_one_letter(written: str, name: str) -> None:
    assert normalize(written, "Hindi") == unicodedata.lookup(f"DEVANAGARI LETTER {name}")


@pytest.mark.parametrize("text", ["हँस", "हंस", "अंगूर", "आई", "अ्", "काम"])
def test_hindi_keeps_what_tells_words_apart(text: str) -> None:
    assert normalize(text, "Hindi") == text


@pytest.mark.parametrize("base", ["\u0915", "\u0916", "\u0917", "\u091c", "\u0921", "\u0922", "\u092b", "\u092f"])
def test_hindi_nukta_letters_have_one_form(base: str) -> None:
    # U+0958 to U+095F, which Unicode's table of composition exclusions lists.
    composed = next(
        chr(code) for code in range(0x958, 0x960) if unicodedata.decomposition(chr(code))[:4] == f"{ord(base):04X}"
    )

    assert normalize(composed, "Hindi") == normalize(base + "\u093c", "Hindi") == base + "\u093c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("DİYARBAKIR", "diyarbakır"), ("I\u0307stanbul", "istanbul"), ("i\u0307\u0307yi", "iyi"), ("Ilık", "ılık")],
)
def test_turkish_i_has_a_dot_in_both_cases_or_in_none(text: str, expected: str) -> None:
    assert normalize(text, "Turkish") == expected


def test_fold_case_is_unicodes_in_every_other_language_but_for_the_capital_with_a_dot() -> None:
    # CaseFolding.txt, statuses C and F: 0049, 00DF, 03C2; and T for 0130.
    assert fold_case("Iİßς", None) == fold_case("Iİßς", "German") == "iissσ"


def test_an_unknown_language_has_the_rules_of_scripts_only() -> None:
    assert spelt("ş ё œ ي hòa เเ", None) == "ş ё œ ي hòa แ"


def test_rules_are_for_languages_of_the_model() -> None:
    assert set(LETTERS) <= set(LANGUAGES)


ALPHABETS = {
    "Thai": "ก\u0e4d\u0e32\u0e33\u0e40\u0e41\u0e48\u0e49\u0e4c\u0e31\u0e35\u0e38\u0e3a\u0334\u0301 '",
    "Hindi": "क\u0905\u0906\u0909\u090f\u093e\u0941\u0945\u0947\u0948\u094b\u093c\u094d\u200d '",
    "Persian": "\u0627\u0628\u064a\u0649\u06cc\u0643\u06c0\u06d5\u0647\u06c1\u0654\u064e\u0653\u0651\u0640\u200c '",
    "Russian": "еёйи\u0308\u0301\u0306\u0323\u034f '",
    "Turkish": "iıIİ\u0307\u0323\u0301\u0327\u200d '",
    "Romanian": "sştțŞ\u0327\u0326\u0323\u0321\ufe0f '",
    "French": "œæŒeoé\u0301\u0308\u0323 '",
    "Vietnamese": "hqoaeuyòúóảụ\u0300\u0301\u0303\u0309\u0323\u0302 '1",
}


@pytest.mark.parametrize("language", ALPHABETS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_rules_leave_nothing_to_do_for_the_next_time(language: str, data: st.DataObject) -> None:
    """Of the letters and marks that the rules are about, in any order, also where no reader would have them."""
    text = data.draw(st.text(ALPHABETS[language], max_size=14))

    once = normalize(text, language)

    assert normalize(once, language) == once


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("Thai", "\u0e41\u0e48\u0e31\u0e3a\u0e31"),  # phinthu, which canonical order puts before the tone
        ("Thai", "ก\u0e32\u0e48\u0e32\u0e48"),
        ("Thai", "ก\u0e48\u0e31\u0e48\u0e35"),
        ("Thai", "\u0e40\u0e40\u0e40\u0e40\u0e40ก"),
        ("Hindi", "\u0905\u093e\u0947\u0947"),
        ("Russian", "е\u0323\u0308\u0308"),  # NFC composes the second diaeresis once the first has gone
        ("Romanian", "ş\u0327"),
        ("Romanian", "t\u0321\u0327\u0327"),
        ("Turkish", "I\u0307\u0307\u0323\u0307"),
        ("Persian", "\u06d5\u0654\u064e\u0654"),
        ("Vietnamese", "óòa ọóe"),
    ],
)
def test_rules_leave_nothing_to_do_where_marks_are_piled_up(language: str, text: str) -> None:
    once = normalize(text, language)

    assert normalize(once, language) == once
