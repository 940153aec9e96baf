"""The six programs through ``launch/run.py`` on a smaller ``configs/toy.yaml``: bfloat16, two ranks and ZeRO-2."""

import json
import re
import shlex
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qad_dist.text.predictions import read_predictions
from qad_dist.text.wer import corpus, count_errors
from tests.helpers.digits import DigitsRun
from tests.helpers.launching import Ended, run_python

STAGES = ["pack", "label", "quantize", "train", "score", "export"]

SMALLER = [
    *("pack.utterances_per_shard=8", "quantize.calibration_utterances=24", "train.steps=6", "train.warmup_steps=1"),
    *("train.evaluate_every=3", "train.checkpoint_every=3", "train.micro_batch_tokens=512"),
    # The run's own is float32, for speed on any CPU; the real model's is this.
    *("export.verify_utterances=3", "model.dtype=bfloat16"),
    "read.workers=1",
]

NUM_QUANTIZERS = 42
"""Weight and input of the 7 Linears in each of the teacher's 3 layers."""


@dataclass(frozen=True, slots=True)
class Starts:
    """Three starts of one run: to label, from quantize, and all once more."""

    run: Path
    settings: list[str]
    first: Ended
    second: Ended
    third: Ended


@pytest.fixture(scope="module")
def starts(digits: DigitsRun, tmp_path_factory) -> Starts:
    folder = tmp_path_factory.mktemp("toy")
    settings = [f"run={folder}/run", f"pack.inputs=[{digits.manifest}]", *SMALLER]
    ended = []
    for options in (["--to", "label"], ["--from", "quantize"], []):
        arguments = ["--config", "configs/toy.yaml", *options, "--set", *settings]
        ended.append(run_python("launch/run.py", *arguments, folder=folder / "output"))
        assert ended[-1].code == 0, ended[-1].stderr
    return Starts(folder / "run", settings, *ended)


def events_of_stages(log: str) -> list[tuple[str, str]]:
    return re.findall(r" event=(started|skipped|ended) stage=(\w+)", log)


def errors_of(table: str, system: str) -> list[str]:
    """Rate, interval and errors by kind, as the table of systems has them in eight columns."""
    rows = [line.split("|") for line in table.splitlines() if line.startswith(f"{system} ")]
    (row,) = (row for row in rows if len(row) == 8)
    return [cell.strip() for cell in row[1:6]]


def test_run_does_the_chosen_stages_and_another_start_the_others(starts):
    done = [(event, stage) for stage in STAGES[:2] for event in ("started", "ended")]
    rest = [(event, stage) for stage in STAGES[2:] for event in ("started", "ended")]

    assert events_of_stages(starts.first.stderr) == done
    assert events_of_stages(starts.second.stderr) == rest


def test_start_of_a_finished_run_skips_all_stages_at_once_and_shows_the_result_again(starts):
    assert events_of_stages(starts.third.stderr) == [("skipped", stage) for stage in STAGES]
    assert starts.second.stdout.endswith(starts.third.stdout)


def test_training_ran_on_two_ranks_under_deepspeed_zero_2(starts):
    assert "rank=0 event=engine sharding=ZeRO-2 type=DEEPSPEED ranks=2 trained_weights=589824" in starts.second.stderr
    shares = sorted((starts.run / "train" / "step-000006").glob("rank-*.safetensors"))
    assert [path.name for path in shares] == ["rank-000.safetensors", "rank-001.safetensors"]
    names = [set(load_file(path)) for path in shares]
    assert not names[0] & names[1]
    # Master and two moments of the 7 Linears in each of 3 layers.
    assert len(names[0] | names[1]) == 3 * 21


def test_each_stage_leaves_its_record(starts):
    for stage in STAGES:
        record = json.loads((starts.run / stage / "done.json").read_text())

        assert record["stage"] == stage
        assert record["config"]["run"] == str(starts.run)
        assert record["config"]["train"]["steps"] == 6
        assert f"launch/{stage}.py --config configs/toy.yaml" in record["command"]
        assert {"torch", "transformers", "deepspeed", "nvidia-modelopt"} <= set(record["versions"])


def test_table_compares_teacher_ptq_and_qad(starts):
    score = json.loads((starts.run / "score" / "score.json").read_text())

    systems = score["sections"]["own"]["systems"]
    assert set(systems) == set(score["systems"]) == {"teacher", "ptq", "qad"}
    for name, system in systems.items():
        predictions = read_predictions(starts.run / "score" / "own" / f"{name}.jsonl").values()
        counts = corpus(count_errors(one.reference, one.text, language=one.language) for one in predictions)
        kinds = [counts.substitutions, counts.deletions, counts.insertions]
        assert len(predictions) == 15
        assert system["overall"]["error_rate"] == pytest.approx(counts.rate)
        rate, interval, *told = errors_of(starts.third.stdout, name)
        assert (rate, told) == (f"{100 * counts.rate:.2f}", [str(kind) for kind in kinds])
        low, high = map(float, interval.split(" to "))
        assert low <= float(rate) <= high
    # The embedded teacher makes 6 % errors on digits of voices that it has not heard.
    assert systems["teacher"]["overall"]["error_rate"] < 0.2
    assert 0 < systems["ptq"]["overall"]["kl_per_token"] < 0.02
    assert 0 < systems["qad"]["overall"]["kl_per_token"] < 0.02
    assert (starts.run / "score" / "own" / "worst.md").is_file()


def test_verify_accepts_labels_and_shards(starts, tmp_path):
    commands = [
        [program, "verify", "--config", "configs/toy.yaml", "--set", *starts.settings] for program in STAGES[:2]
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))

    program = "tests/helpers/run_programs.py"
    files = [tmp_path / "commands.json", tmp_path / "answers.json"]
    ended = run_python(program, *files, folder=tmp_path / "output")

    assert ended.code == 0, ended.stderr
    packed, labelled = json.loads((tmp_path / "answers.json").read_text())
    assert packed["code"] == 0
    assert "verified shards=9 utterances=70" in packed["stderr"]
    assert labelled["code"] == 0
    assert "event=verified labels=55" in labelled["stderr"]


def test_export_has_the_quantizers_of_the_trained_student(starts):
    trained, exported = (json.loads((starts.run / stage / "done.json").read_text()) for stage in ("train", "export"))

    assert exported["results"]["quantizers"] == NUM_QUANTIZERS
    assert exported["results"]["equal_transcripts"] == 3
    assert exported["results"]["quantizer_sha256"] == trained["results"]["quantizer_sha256"]


def test_printed_lines_transcribe_a_file_with_the_export(starts, tmp_path):
    """As a user who copies them, in a fresh process; only ``FILE.wav`` is replaced.

    Behind our text stands what the embedded teacher goes on with: qwen-asr stops at the end tokens of the real model's
    vocabulary only. ModelOpt's checkpointing is what makes the folder load quantized; without that line it loads too,
    unquantized, so quantizers are counted.
    """
    audio, expected = longest_english_utterance(starts.run)
    (tmp_path / "audio.flac").write_bytes(audio)
    command = starts.third.stdout.splitlines()[-1]
    python, option, code = shlex.split(command)
    counting = (
        "from modelopt.torch.quantization.nn import TensorQuantizer\n"
        "from qwen_asr import Qwen3ASRModel\n"
        "loaded, load = [], Qwen3ASRModel.from_pretrained\n"
        "Qwen3ASRModel.from_pretrained = lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0]\n"
        f"{code.replace('FILE.wav', str(tmp_path / 'audio.flac'))}\n"
        "modules = loaded[0].model.modules()\n"
        "print('quantizers', sum(isinstance(m, TensorQuantizer) and m.is_enabled for m in modules))\n"
    )

    ended = run_python("-c", counting, folder=tmp_path / "output")

    assert (python, option) == ("python", "-c")
    assert ended.code == 0, ended.stderr
    text, quantizers = ended.stdout.splitlines()[-2:]
    assert len(expected) > 3
    assert text.startswith(expected)
    assert quantizers == f"quantizers {NUM_QUANTIZERS}"


def longest_english_utterance(run: Path) -> tuple[bytes, str]:
    """FLAC bytes of a test utterance, read from its tar by name, and what the trained student wrote for it."""
    predictions = read_predictions(run / "score" / "own" / "qad.jsonl").values()
    chosen = max((one for one in predictions if one.language == "English"), key=lambda one: one.extra["duration"])
    for shard in sorted((run / "pack").glob("test-*.tar")):
        with tarfile.open(shard) as tar:
            if f"{chosen.key}.flac" in tar.getnames():
                return tar.extractfile(f"{chosen.key}.flac").read(), chosen.text
    raise AssertionError(f"no shard holds {chosen.key}")
