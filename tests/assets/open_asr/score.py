"""Score ``pairs.jsonl`` again with the Open ASR Leaderboard's own code, which is not part of this project.

    git clone https://github.com/huggingface/open_asr_leaderboard LEADERBOARD
    git -C LEADERBOARD checkout d1e99b25524814332d6868a5645e568670834cfb
    python tests/assets/open_asr/score.py LEADERBOARD

Writes beside this file: ``scored.jsonl``, a line for each pair with the forms of both texts, whether the leaderboard
scores the utterance, and its errors; ``total.json``, what the leaderboard's ``score_results`` says of all that it
scores; and ``manifest.jsonl``, four of the pairs as its ``write_manifest`` writes them. Needs kaldialign and regex.
"""

import contextlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent

# Of the pairs, by their place: with an accent, a tab, a comma, and no text at all.
IN_MANIFEST = (302, 332, 165, 315)


def load_leaderboard(folder: Path) -> tuple[Any, Any]:
    """Its modules ``data_utils`` and ``eval_utils``; what they need only to load audio is not needed here."""
    for name, members in {
        "num2words": (),
        "datasets": ("Audio", "IterableDataset", "load_dataset"),
        "huggingface_hub": ("snapshot_download",),
    }.items():
        sys.modules[name] = ModuleType(name)
        for member in members:
            setattr(sys.modules[name], member, None)
    sys.path.insert(0, str(folder))
    return importlib.import_module("normalizer.data_utils"), importlib.import_module("normalizer.eval_utils")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_manifest(eval_utils: Any, rows: list[dict[str, Any]]) -> Path:
    path = eval_utils.write_manifest(
        [row["reference"] for row in rows],
        [row["hypothesis"] for row in rows],
        "ours/nano",
        "ours/pairs",
        "pairs",
        "test",
        audio_length=[1.5 + number for number in range(len(rows))],
        transcription_time=[0.25] * len(rows),
        audio_filepaths=[None] + [f"pair-{number}.flac" for number in range(1, len(rows))],
        extra_fields={"kind": [row["kind"] for row in rows]},
    )
    return Path(path).resolve()


def main() -> None:
    data_utils, eval_utils = load_leaderboard(Path(sys.argv[1]).resolve())
    pairs = [json.loads(line) for line in (HERE / "pairs.jsonl").open(encoding="utf-8")]
    scored = []
    for pair in pairs:
        texts = {side: data_utils.normalizer(pair[side]) for side in ("reference", "hypothesis")}
        counts = eval_utils.batch_error_rate(
            [texts["reference"].split()], [texts["hypothesis"].split()], merge_compounds=True
        )
        is_scored = data_utils.is_target_text_in_range(texts["reference"])
        scored.append(
            texts | {"is_scored": is_scored} | {name: counts[name] for name in ("ins", "del", "sub", "ref_len")}
        )
    write_lines(HERE / "scored.jsonl", scored)
    kept = [pair for pair, one in zip(pairs, scored, strict=True) if one["is_scored"]]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_manifest(eval_utils, kept)
        _, results = eval_utils.score_results(str(Path("results").resolve()))
        (total,) = results.values()
    (HERE / "total.json").write_text(json.dumps({"utterances": len(kept)} | total, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = write_manifest(eval_utils, [pairs[place] for place in IN_MANIFEST]).read_text(encoding="utf-8")
    (HERE / "manifest.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
