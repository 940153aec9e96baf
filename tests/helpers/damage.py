"""Damage to packed audio, as a disk or a transfer does it: the bytes are there, and are others."""

from pathlib import Path

from shards.schema import Utterance


def spoil(folder: Path, utterance: Utterance) -> None:
    """Overwrite the middle of an utterance's audio with zeros."""
    with (folder / utterance.shard).open("r+b") as file:
        file.seek(utterance.audio_offset + utterance.audio_bytes // 3)
        file.write(bytes(utterance.audio_bytes // 3))
