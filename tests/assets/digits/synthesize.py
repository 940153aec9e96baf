"""Make the spoken digits again: 29 languages by espeak-ng, as Ogg Opus at 16 kHz, with their manifest.

    python tests/assets/digits/synthesize.py

Needs the program espeak-ng (Debian package of that name), soundfile and soxr. The words are those that the nano teacher
learned; test voices are none of its training voices, and held-out voices are none of this set's training voices.
"""

import json
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE_HZ = 16_000

# Of libsndfile's Opus encoder: 0 is its highest bit rate, 1 its lowest (6 kbit/s).
# Here 21 kbit/s: the nano teacher makes no more errors on these files than on the speech before encoding.
COMPRESSION_LEVEL = 0.94

SEED = 2026

# Utterances per language, and the espeak-ng variants that stand for speakers.
SPLITS = {
    "train": (14, ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3")),
    "heldout": (3, ("m6", "f4")),
    "test": (8, ("m7", "m8", "f5")),
}

# Language as the model names it: espeak-ng voice, and the digits from zero to nine.
LANGUAGES = {
    "English": ("en-us", "zero one two three four five six seven eight nine"),
    "Chinese": ("cmn", "零 一 二 三 四 五 六 七 八 九"),
    "Cantonese": ("yue", "零 一 二 三 四 五 六 七 八 九"),
    "Arabic": ("ar", "صفر واحد اثنان ثلاثة أربعة خمسة ستة سبعة ثمانية تسعة"),
    "German": ("de", "null eins zwei drei vier fünf sechs sieben acht neun"),
    "French": ("fr-fr", "zéro un deux trois quatre cinq six sept huit neuf"),
    "Spanish": ("es", "cero uno dos tres cuatro cinco seis siete ocho nueve"),
    "Portuguese": ("pt", "zero um dois três quatro cinco seis sete oito nove"),
    "Indonesian": ("id", "nol satu dua tiga empat lima enam tujuh delapan sembilan"),
    "Italian": ("it", "zero uno due tre quattro cinque sei sette otto nove"),
    "Korean": ("ko", "영 일 이 삼 사 오 육 칠 팔 구"),
    "Russian": ("ru", "ноль один два три четыре пять шесть семь восемь девять"),
    "Thai": ("th", "ศูนย์ หนึ่ง สอง สาม สี่ ห้า หก เจ็ด แปด เก้า"),
    "Vietnamese": ("vi", "không một hai ba bốn năm sáu bảy tám chín"),
    "Japanese": ("ja", "ぜろ いち に さん よん ご ろく なな はち きゅう"),
    "Turkish": ("tr", "sıfır bir iki üç dört beş altı yedi sekiz dokuz"),
    "Hindi": ("hi", "शून्य एक दो तीन चार पाँच छह सात आठ नौ"),
    "Malay": ("ms", "kosong satu dua tiga empat lima enam tujuh lapan sembilan"),
    "Dutch": ("nl", "nul een twee drie vier vijf zes zeven acht negen"),
    "Swedish": ("sv", "noll ett två tre fyra fem sex sju åtta nio"),
    "Danish": ("da", "nul en to tre fire fem seks syv otte ni"),
    "Finnish": ("fi", "nolla yksi kaksi kolme neljä viisi kuusi seitsemän kahdeksan yhdeksän"),
    "Polish": ("pl", "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć"),
    "Czech": ("cs", "nula jedna dva tři čtyři pět šest sedm osm devět"),
    "Persian": ("fa", "صفر یک دو سه چهار پنج شش هفت هشت نه"),
    "Greek": ("el", "μηδέν ένα δύο τρία τέσσερα πέντε έξι επτά οκτώ εννέα"),
    "Romanian": ("ro", "zero unu doi trei patru cinci șase șapte opt nouă"),
    "Hungarian": ("hu", "nulla egy kettő három négy öt hat hét nyolc kilenc"),
    "Macedonian": ("mk", "нула еден два три четири пет шест седум осум девет"),
}

WITHOUT_SPACES = {"Chinese", "Cantonese", "Japanese", "Thai"}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to say and how, and what the manifest tells of it."""

    key: str
    language: str
    text: str
    split: str
    voice: str
    """espeak-ng voice with its variant: the speaker."""
    say: str
    words_per_minute: int
    pitch: int


def plan_prompts(seed: int) -> list[Prompt]:
    """One to five digits for each utterance, speakers in turn; equal seeds give equal plans."""
    prompts = []
    for language, (voice, words) in LANGUAGES.items():
        for split, (count, variants) in SPLITS.items():
            generator = random.Random(f"{seed} {language} {split}")
            for i in range(count):
                digits = generator.choices(words.split(), k=generator.randint(1, 5))
                prompts.append(
                    Prompt(
                        key=f"{voice}-{split}-{i:02d}",
                        language=language,
                        text=("" if language in WITHOUT_SPACES else " ").join(digits),
                        split=split,
                        voice=f"{voice}+{variants[i % len(variants)]}",
                        say=", ".join(digits),
                        words_per_minute=generator.randint(115, 190),
                        pitch=generator.randint(30, 70),
                    )
                )
    return prompts


def speak(prompt: Prompt) -> np.ndarray:
    """The prompt as float32 samples at :data:`SAMPLE_RATE_HZ`."""
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "spoken.wav"
        rate, pitch = str(prompt.words_per_minute), str(prompt.pitch)
        command = ["espeak-ng", "-v", prompt.voice, "-s", rate, "-p", pitch, "-w", str(spoken), prompt.say]
        subprocess.run(command, check=True, capture_output=True)
        samples, rate_hz = soundfile.read(spoken, dtype="float32")
    return soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ, quality="VHQ")


def main() -> None:
    """Write ``audio/*.opus`` and ``manifest.jsonl`` beside this file."""
    folder = Path(__file__).parent
    (folder / "audio").mkdir(exist_ok=True)
    lines = []
    for prompt in plan_prompts(SEED):
        name = f"audio/{prompt.key}.opus"
        soundfile.write(
            folder / name,
            speak(prompt),
            SAMPLE_RATE_HZ,
            format="OGG",
            subtype="OPUS",
            compression_level=COMPRESSION_LEVEL,
        )
        row = {
            "audio": name,
            "text": prompt.text,
            "language": prompt.language,
            "split": prompt.split,
            "speaker": prompt.voice,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
