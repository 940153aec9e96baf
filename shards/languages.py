"""The model's 30 languages, and the names and codes that corpora use for them. Pure: no I/O."""

import re

from shards.errors import SourceError

LANGUAGES = (
    *(
        "Chinese",
        "English",
        "Cantonese",
        "Arabic",
        "German",
        "French",
        "Spanish",
        "Portuguese",
        "Indonesian",
        "Italian",
    ),
    *("Korean", "Russian", "Thai", "Vietnamese", "Japanese", "Turkish", "Hindi", "Malay", "Dutch", "Swedish"),
    *("Danish", "Finnish", "Polish", "Czech", "Filipino", "Persian", "Greek", "Romanian", "Hungarian", "Macedonian"),
)
"""As the model writes them in ``language <name>``."""

# ISO 639-1, 639-2 (both forms) and 639-3 codes, and further names; `_` stands for what separates parts.
_ALIASES = {
    "Chinese": "zh zho chi cmn mandarin mandarin_chinese",
    "English": "en eng",
    "Cantonese": "yue zh_yue zh_hk cantonese_chinese",  # Common Voice's zh-HK is spoken Cantonese
    "Arabic": "ar ara arb",
    "German": "de deu ger",
    "French": "fr fra fre",
    "Spanish": "es spa",
    "Portuguese": "pt por",
    "Indonesian": "id ind bahasa_indonesia",
    "Italian": "it ita",
    "Korean": "ko kor",
    "Russian": "ru rus",
    "Thai": "th tha",
    "Vietnamese": "vi vie",
    "Japanese": "ja jpn",
    "Turkish": "tr tur",
    "Hindi": "hi hin",
    "Malay": "ms msa may zsm bahasa_melayu",
    "Dutch": "nl nld dut",
    "Swedish": "sv swe",
    "Danish": "da dan",
    "Finnish": "fi fin",
    "Polish": "pl pol",
    "Czech": "cs ces cze",
    "Filipino": "fil tl tgl tagalog",
    "Persian": "fa fas per pes farsi",
    "Greek": "el ell gre",
    "Romanian": "ro ron rum",
    "Hungarian": "hu hun",
    "Macedonian": "mk mkd mac",
}
_NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in [name.lower(), *aliases.split()]}


def language_name(value: str | None) -> str | None:
    """The model's name of a language.

    Args:
        value: A name in any case (``vietnamese``), or a code, also with script and region (``vi``, ``vi_vn``,
            ``cmn_hans_cn``, ``pt-BR``, ``zh-TW``); None or blank if the language is not known.

    Raises:
        SourceError: The value is not one of the model's languages.
    """
    code = re.sub(r"-+", "_", (value or "").strip().lower())
    if not code:
        return None
    parts = code.split("_")
    # A region decides only where it is listed (zh_hk); and a subtag can only follow a code, never a whole name.
    region = f"{parts[0]}_{parts[-1]}"
    candidates = [re.sub(r"\s+", "_", code), "_".join(parts[:2]), region, parts[0] if len(parts[0]) <= 3 else ""]
    for candidate in candidates:
        if candidate in _NAMES:
            return _NAMES[candidate]
    raise SourceError(
        f"language must be one of {', '.join(LANGUAGES)} or a code of one, got {value!r}; mend the source, or leave "
        "recordings in other languages out of it"
    )
