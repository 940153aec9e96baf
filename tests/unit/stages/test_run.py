"""The whole run: order, skipping, the first failure, and the commands. The programs are real processes."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qad_dist.config import RunConfig, load_run
from qad_dist.runtime.record import STAGES, begin_stage, finish_stage
from qad_dist.stages import run as run_module
from qad_dist.stages.run import Launch, StageFailedError, chosen_stages, dry_run, run
from shards.errors import ConfigError

# A program that notes its name and options, and fails where its run folder holds `<its name>.fails`.
PROGRAM = """\
import sys
from pathlib import Path
name, folder = Path(__file__).stem, Path({folder!r})
with (folder / "started").open("a") as file:
    file.write(name + " " + " ".join(sys.argv[1:]) + "\\n")
sys.exit(3 if (folder / (name + ".fails")).exists() else 0)
"""


@pytest.fixture
def config(root: Path, tmp_path: Path) -> RunConfig:
    return load_run(root / "configs/toy.yaml", [f"run={tmp_path}/run"])


@pytest.fixture
def single_process_launch(tmp_path: Path) -> Launch:
    """Programs that note that they were started, for the two stages that need no launcher."""
    programs = tmp_path / "launch"
    programs.mkdir()
    for stage in ("pack", "export"):
        (programs / f"{stage}.py").write_text(PROGRAM.format(folder=str(tmp_path)))
    return Launch(programs=programs, config="c.yaml", overrides=("seed=3", "train.steps=70"), micro_batches_per_step=2)


def started(tmp_path: Path) -> list[str]:
    path = tmp_path / "started"
    return path.read_text().splitlines() if path.exists() else []


def test_stages_are_chosen_in_the_order_of_the_pipeline():
    assert chosen_stages("pack", "export") == ["pack", "label", "quantize", "train", "score", "export"]
    assert chosen_stages("quantize", "score") == ["quantize", "train", "score"]
    assert chosen_stages("train", "train") == ["train"]
    with pytest.raises(ConfigError, match=r"^--to must not come before --from \(train\), got label"):
        chosen_stages("train", "label")


def test_programs_are_started_in_order_with_config_and_settings(config, single_process_launch, tmp_path):
    run(config, single_process_launch, ["pack", "export"])

    options = "--config c.yaml --set seed=3 train.steps=70"
    assert started(tmp_path) == [f"pack {options}", f"export {options}"]


def test_finished_stage_is_skipped_and_made_again_when_its_settings_change(config, single_process_launch, tmp_path):
    begin_stage(config, "pack")
    finish_stage(config, "pack", results={})

    run(config, single_process_launch, ["pack", "export"])
    assert [line.split()[0] for line in started(tmp_path)] == ["export"]

    run(config.model_copy(update={"seed": 9}), single_process_launch, ["pack"])
    assert [line.split()[0] for line in started(tmp_path)] == ["export", "pack"]


def test_first_failing_stage_ends_the_run_with_its_exit_code(config, single_process_launch, tmp_path):
    (tmp_path / "pack.fails").touch()

    with pytest.raises(StageFailedError, match=r"^stage pack must end with exit code 0, got 3 after .* s;") as caught:
        run(config, single_process_launch, ["pack", "export"])

    assert caught.value.exit_code == 3
    assert [line.split()[0] for line in started(tmp_path)] == ["pack"]


@pytest.mark.parametrize(
    ("num_gpus", "file", "ranks"), [(0, "cpu.yaml", "2"), (1, "one_gpu.yaml", "1"), (5, "one_node.yaml", "5")]
)
def test_stages_of_several_ranks_go_through_accelerate_as_the_machine_has_it(root, num_gpus, file, ranks):
    launch = Launch(programs=root / "launch", config="c.yaml", num_gpus=num_gpus, micro_batches_per_step=8)

    for stage in ("label", "quantize", "train", "score"):
        assert launch.command(stage) == [
            *("accelerate", "launch", "--config_file", str(root / "configs/accelerate" / file)),
            *("--num_processes", ranks, str(root / "launch" / f"{stage}.py"), "--config", "c.yaml"),
        ]
    for stage in ("pack", "export"):
        assert launch.command(stage) == ["python", str(root / "launch" / f"{stage}.py"), "--config", "c.yaml"]


@pytest.mark.parametrize(
    ("num_gpus", "micro_batches", "file", "ranks"),
    [(8, 2, "one_node", 2), (8, 8, "one_node", 8), (8, 16, "one_node", 8), (8, 1, "one_gpu", 1), (0, 1, "cpu", 1)],
)
def test_training_gets_no_more_ranks_than_a_step_has_micro_batches(root, num_gpus, micro_batches, file, ranks):
    launch = Launch(programs=root / "launch", config="c.yaml", num_gpus=num_gpus, micro_batches_per_step=micro_batches)

    words = {stage: launch.command(stage) for stage in ("label", "train")}

    assert words["train"][3].endswith(f"/{file}.yaml")
    assert words["train"][4:6] == ["--num_processes", str(ranks)]
    assert words["label"][4:6] == ["--num_processes", str(num_gpus or 2)]


def test_gpus_that_training_leaves_idle_are_told(config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_module, "_call", lambda command, environment: 0)
    launch = Launch(programs=tmp_path, config="c.yaml", num_gpus=8, micro_batches_per_step=2)
    stages = ["pack", "label", "train", "export"]

    with caplog.at_level(logging.INFO, logger="qad_dist"):
        run(config, launch, stages)

    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["event=idle_gpus stage=train gpus=6 remedy='raise train.micro_batches_per_step'"]
    told = [message.split(" ")[:2] for message in caplog.messages if "idle" not in message]
    assert told == [[f"event={event}", f"stage={stage}"] for stage in stages for event in ("started", "ended")]


def test_dry_run_tells_commands_hours_steps_memory_and_disk_and_writes_nothing(config, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)

    launch = Launch(programs=Path("launch"), config="c.yaml", num_gpus=8, micro_batches_per_step=2)
    text = dry_run(config, launch, list(STAGES))

    for stage in STAGES:
        assert f"launch/{stage}.py --config c.yaml" in text
        assert f"\n  {stage}: " in text
    # 1,493.9 s by libsndfile.
    hours = re.search(r"audio: (\S+) hours \(from what 725 of 725 recordings or their sources tell\)", text)
    assert hours is not None
    assert float(hours[1]) == pytest.approx(0.415, abs=0.01)  # decoders differ in the padding of Opus that they count
    assert f"training: {config.train.steps} steps of 2 micro-batches of up to 2048 tokens on 2 ranks" in text
    assert f"(2 ranks, ZeRO-2, {config.model.dtype})" in text
    assert list(tmp_path.iterdir()) == []


def test_sigterm_to_the_runner_ends_the_program_that_it_waits_for(root, tmp_path):
    programs = tmp_path / "launch"
    programs.mkdir()
    (programs / "pack.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        f"Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    script = (
        "import sys\nfrom pathlib import Path\nfrom qad_dist.config import load_run\n"
        "from qad_dist.stages.run import Launch, run\n"
        f"config = load_run({str(root / 'configs/toy.yaml')!r}, ['run={tmp_path}/run'])\n"
        f"run(config, Launch(programs=Path({str(programs)!r}), config='c', micro_batches_per_step=2), ['pack'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True) as runner:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert runner.poll() is None, runner.stderr.read()
            time.sleep(0.05)
        runner.send_signal(signal.SIGTERM)
        _, told = runner.communicate(timeout=30)

    assert "stage pack must end with exit code 0, got -15" in told
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
