"""Small corpora in the layouts of real ones. Texts tell the number of the tone that is the recording."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import soundfile

from tests.helpers.tones import make_tone, write_tone


def write_lines(path: Path, *lines: object) -> Path:
    """Write texts as lines, and everything else as JSON; packed if the name ends in ``.gz``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def tone_bytes(number: int, *, kind: str = "FLAC", seconds: float = 0.4) -> bytes:
    """A tone as the bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, make_tone(number, seconds=seconds), 16_000, format=kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A plain tar of these members, in this order, as Python writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def make_kaldi(folder: Path) -> Path:
    """Two recordings, three segments, one of them without text and speaker."""
    for number in range(2):
        write_tone(folder / f"wav/rec{number}.wav", number, seconds=1.0)
    write_lines(folder / "wav.scp", f"rec0 {folder}/wav/rec0.wav", "rec1 wav/rec1.wav")
    write_lines(folder / "segments", "ann-0 rec0 0.0 0.4", "ann-1 rec0 0.4 1.0", "bob-0 rec1 0.25 -1")
    write_lines(folder / "text", "ann-0 số không", "ann-1")
    write_lines(folder / "utt2spk", "ann-0 ann", "ann-1 ann")
    write_lines(folder / "utt2lang", "ann-0 vi", "bob-0 English")
    return folder


def make_librispeech(folder: Path) -> Path:
    """Three utterances of two speakers in two splits, one of them without a transcript."""
    write_tone(folder / "train-clean-100/103/1240/103-1240-0000.flac", 0)
    write_tone(folder / "train-clean-100/103/1240/103-1240-0001.flac", 1)
    write_tone(folder / "test-other/367/130732/367-130732-0000.flac", 2)
    write_lines(folder / "train-clean-100/103/1240/103-1240.trans.txt", "103-1240-0000 ZERO ZERO")
    write_lines(folder / "test-other/367/130732/367-130732.trans.txt", "367-130732-0000 TWO")
    write_lines(folder / "SPEAKERS.TXT", "; about speakers")
    return folder


def make_mls(folder: Path) -> Path:
    """Two utterances in two splits."""
    for number, split in enumerate(["train", "dev"]):
        write_tone(folder / f"{split}/audio/10{number}/7/10{number}_7_000000.flac", number)
        write_lines(folder / f"{split}/transcripts.txt", f"10{number}_7_000000\tdie nummer {number}")
    return folder


def make_vivos(folder: Path) -> Path:
    """One utterance in each of the two splits."""
    for number, (split, speaker) in enumerate([("train", "VIVOSSPK01"), ("test", "VIVOSDEV01")]):
        write_tone(folder / f"{split}/waves/{speaker}/{speaker}_R00{number}.wav", number)
        write_lines(folder / f"{split}/prompts.txt", f"{speaker}_R00{number} SỐ {number}")
        write_lines(folder / f"{split}/genders.txt", f"{speaker} m")
    return folder


CV_COLUMNS = "client_id\tpath\tsentence_id\tsentence\tup_votes\tdown_votes\tlocale"


def make_common_voice(folder: Path) -> Path:
    """A clip in each split, and one that is validated but in none."""
    rows = [
        f'speaker{number}\tcommon_voice_vi_{number}.mp3\tid\tSố "{number}\t2\t0\tvi' for number in range(4)
    ]  # a quotation mark that nothing closes
    for number in range(4):
        path = folder / f"clips/common_voice_vi_{number}.mp3"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tone_bytes(number, kind="MP3"))
    for number, name in enumerate(["train", "dev", "test"]):
        write_lines(folder / f"{name}.tsv", CV_COLUMNS, rows[number])
    write_lines(folder / "validated.tsv", CV_COLUMNS, *rows)
    return folder


def make_fleurs(folder: Path, *, splits: tuple[str, ...] = ("train", "dev", "test")) -> Path:
    """An utterance in each split."""
    for number, split in enumerate(splits):
        write_tone(folder / f"audio/{split}/98{number}.wav", number, seconds=0.5)
        write_lines(
            folder / f"{split}.tsv",
            f"{number}\t98{number}.wav\tSố {number}.\tsố {number}\ts ố | {number} |\t8000\tMALE",
        )
    return folder


def cut(number: int, **changes: object) -> dict[str, object]:
    """A cut as lhotse 1.33 writes it: the whole of a recording of 1 s."""
    return {
        "id": f"cut.{number}",
        "start": 0.0,
        "duration": 1.0,
        "channel": 0,
        "supervisions": [
            {
                **{"id": f"sup{number}", "recording_id": f"rec{number}", "start": 0, "duration": 0.5, "channel": 0},
                **{"text": f"số {number}", "language": "Vietnamese", "speaker": f"s{number}"},
            }
        ],
        "recording": recording(number, {"type": "file", "channels": [0], "source": f"rec{number}.wav"}),
        "type": "MonoCut",
        **changes,
    }


def recording(number: int, source: dict[str, object]) -> dict[str, object]:
    """A recording of 1 s as lhotse 1.33 writes it."""
    return {
        **{"id": f"rec{number}", "sources": [source], "sampling_rate": 16000, "num_samples": 16000},
        **{"duration": 1.0, "channel_ids": [0]},
    }


def make_shar(folder: Path) -> Path:
    """Three cuts in two shards, as lhotse 1.33's SharWriter writes them."""
    audio = {"type": "shar", "channels": [0], "source": ""}
    for shard, numbers in enumerate([(0, 1), (2,)]):
        cuts = [cut(number, start=0, recording=recording(number, audio)) for number in numbers]
        write_lines(folder / f"cuts.{shard:06d}.jsonl.gz", *cuts)
        members = {}
        for number in numbers:
            members[f"cut.{number}.flac"] = tone_bytes(number, seconds=1.0)
            members[f"cut.{number}.json"] = json.dumps(recording(number, audio)).encode()
        write_tar(folder / f"recording.{shard:06d}.tar", members)
    return folder


def make_nemo_tarred(folder: Path, *, is_sharded: bool = False) -> Path:
    """Two tars of two files, the first file with two stretches, as NeMo's convert_to_tarred_audio_dataset writes."""
    rows = []
    for shard in range(2):
        names = [f"data_{2 * shard}.wav", f"data_{2 * shard + 1}.wav"]
        write_tar(
            folder / f"audio_{shard}.tar",
            {name: tone_bytes(2 * shard + place, kind="WAV", seconds=1.0) for place, name in enumerate(names)},
        )
        rows += [
            {"audio_filepath": name, "duration": 1.0, "text": f"number {2 * shard + place}", "shard_id": shard}
            for place, name in enumerate(names)
        ]
    rows[0] |= {"offset": 0.0, "duration": 0.5}
    rows.insert(1, {**rows[0], "audio_filepath": "data_0-sub1.wav", "offset": 0.5, "text": "again"})
    write_lines(folder / "tarred_audio_manifest.json", *rows)
    if is_sharded:
        for shard in range(2):
            mine = [{name: row[name] for name in row if name != "shard_id"} for row in rows if row["shard_id"] == shard]
            write_lines(folder / f"sharded_manifests/manifest_{shard}.json", *mine)
    return folder
