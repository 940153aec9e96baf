"""A program: unlabelled speech of further voices, as espeak-ng speaks, for the student to learn from.

    python -m tests.benchmarks.voices OUT [--digits 60] [--letters 1600]

Digits in 29 languages, and letters, numbers and commands of the kind that AN4 is of, in English of several regions.
The voices are espeak-ng's variants but for those of the digits' held-out and test utterances. Writes ``OUT/audio`` and
``OUT/manifest.jsonl``, whose lines name no text: nobody but the teacher says what was spoken. Needs the program
espeak-ng (Debian package of that name).
"""

import argparse
import calendar
import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile

from tests.assets.digits.synthesize import LANGUAGES, SAMPLE_RATE_HZ, SPLITS, Prompt, speak

SEED = 2027

ENGLISH = ("en-us", "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029", "en-us-nyc")
COMMANDS = ("yes", "no", "go", "stop", "start", "help", "repeat", "erase", "rubout", "enter")
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten",
    "eleven",
    "twelve",
    *(f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")),
)
TENS = tuple(f"{stem}ty" for stem in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"))
MONTHS = tuple(name.lower() for name in calendar.month_name[1:])
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--digits", type=int, default=60, help="utterances a language")
    arguments.add_argument("--letters", type=int, default=1600, help="utterances")
    options = arguments.parse_args()
    (options.out / "audio").mkdir(parents=True, exist_ok=True)
    prompts = plan_prompts(options.digits, options.letters, variants(), SEED)

    def write(prompt: Prompt) -> str:
        name = f"audio/{prompt.key}.flac"
        soundfile.write(options.out / name, speak(prompt), SAMPLE_RATE_HZ)
        return json.dumps({"audio": name, "speaker": prompt.voice, "split": "train"}) + "\n"

    with ThreadPoolExecutor() as pool:
        lines = list(pool.map(write, prompts))
    (options.out / "manifest.jsonl").write_text("".join(lines))


def variants() -> list[str]:
    """Names of espeak-ng's variants but for those that are held out or tested."""
    listed = subprocess.run(["espeak-ng", "--voices=variant"], check=True, capture_output=True, text=True).stdout
    names = {line.split("!v/")[1].strip() for line in listed.splitlines() if "!v/" in line}
    return sorted(name for name in names.difference(SPLITS["heldout"][1], SPLITS["test"][1]) if " " not in name)


def plan_prompts(num_digits: int, num_letters: int, variants: list[str], seed: int) -> list[Prompt]:
    """Voices and words at random; equal seeds and variants give equal plans."""
    generator = random.Random(seed)
    prompts = []
    for language, (voice, words) in LANGUAGES.items():
        for number in range(num_digits):
            said = generator.choices(words.split(), k=generator.randint(1, 5))
            prompts.append(_prompt(f"{voice}-{number:04d}", language, voice, ", ".join(said), variants, generator))
    for number in range(num_letters):
        region = generator.choice(ENGLISH)
        said = generator.choice((_spelled, _spelled, _numbers, _numbers, _date, _command))(generator)
        prompts.append(_prompt(f"letters-{number:04d}", "English", region, said, variants, generator))
    return prompts


def _prompt(key: str, language: str, voice: str, said: str, variants: list[str], generator: random.Random) -> Prompt:
    return Prompt(
        key=key,
        language=language,
        text=said,
        split="train",
        voice=f"{voice}+{generator.choice(variants)}",
        say=said,
        words_per_minute=generator.randint(115, 190),
        pitch=generator.randint(20, 80),
    )


def _spelled(generator: random.Random) -> str:
    weights = [len(LETTERS) + 4 - place for place in range(len(LETTERS))]
    return ", ".join(letter.upper() for letter in generator.choices(LETTERS, weights, k=generator.randint(2, 10)))


def _number(generator: random.Random) -> str:
    tens, unit, teen = generator.choice(TENS), generator.choice(UNITS), generator.choice(TEENS)
    return generator.choice((unit, unit, unit, unit, generator.choice(("oh", "zero")), tens, f"{tens} {unit}", teen))


def _numbers(generator: random.Random) -> str:
    return " ".join(_number(generator) for _ in range(generator.randint(2, 7)))


def _date(generator: random.Random) -> str:
    day, month = generator.choice((*UNITS, *TEENS)), generator.choice(MONTHS)
    if generator.random() < 0.5:
        month = ", ".join(month.upper())
    return f"{day}, {month}, nineteen {generator.choice(TENS)} {generator.choice(UNITS)}"


def _command(generator: random.Random) -> str:
    command = generator.choice(COMMANDS)
    if generator.random() < 0.3:
        return command
    return f"{command}, {_spelled(generator)}, {_numbers(generator)}"


if __name__ == "__main__":
    main()
