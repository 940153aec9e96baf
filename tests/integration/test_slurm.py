"""The batch files with accelerate and without SLURM: ``srun`` and ``scontrol`` are stood in for by scripts that start
each node's task on this machine, with the variables that SLURM would set.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"

SRUN = """#!/bin/bash
set -eu
printf '%s\\n' "$@" > "$RECORD/srun.txt"
while [[ "$1" == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node[1-2]" ]] && printf '127.0.0.1\\nnode2\\n'
"""
PROGRAM = """
import json, os, pathlib, sys
import torch.distributed as dist
dist.init_process_group("gloo")
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "DS_ACCELERATOR"]
told = {name: os.environ.get(name) for name in names}
told |= {"joined": dist.get_world_size(), "arguments": sys.argv[1:]}
pathlib.Path(os.environ["RECORD"], f"rank-{told['RANK']}.json").write_text(json.dumps(told))
dist.destroy_process_group()
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Environment of a batch script on the first of two nodes without GPUs; ``tmp_path`` is the project's folder."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    # The interpreter that runs the tests, whatever it is called: its accelerate.
    (tools / "accelerate").write_text(
        f'#!/bin/bash\n[[ $1 == launch ]] && shift\nexec "{sys.executable}" -m accelerate.commands.launch "$@"\n'
    )
    (tools / "accelerate").chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_"))}
    return {
        **environment,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RECORD": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(40_000 + os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "RANKS_PER_NODE": "1",
    }


def test_each_node_starts_its_ranks_and_all_of_them_meet(tmp_path: Path, job: dict[str, str]) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    script = 'source launch/slurm/common.sh; launch_on_all_nodes program.py --config "a b.yaml"'

    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=job, check=True, timeout=300)

    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for rank, told in enumerate(ranks):
        assert told == {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "ACCELERATE_USE_DEEPSPEED": "true",
            "DS_ACCELERATOR": "cpu",
            "joined": 2,
            "arguments": ["--config", "a b.yaml"],
        }


@pytest.mark.parametrize("stage", ["label", "train"])
def test_batch_file_asks_for_one_task_a_node_and_a_rank_for_each_gpu(
    tmp_path: Path, job: dict[str, str], stage: str
) -> None:
    (tmp_path / "tools" / "accelerate").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" > "$RECORD/node-$SLURM_NODEID.txt"\n'
    )

    subprocess.run(
        ["bash", SLURM / f"{stage}.sbatch", "--config", "configs/toy.yaml"],
        env={**job, "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "24"},
        check=True,
        timeout=300,
    )

    asked = (tmp_path / "srun.txt").read_text().splitlines()
    assert "--ntasks-per-node=1" in asked
    assert "--cpus-per-task=24" in asked
    for node in range(2):
        words = (tmp_path / f"node-{node}.txt").read_text().splitlines()
        options = dict(zip(words[1:-3:2], words[2:-3:2], strict=True))
        assert words[0] == "launch"
        assert words[-3:] == [f"launch/{stage}.py", "--config", "configs/toy.yaml"]
        assert options["--machine_rank"] == str(node)
        assert options["--num_machines"] == "2"
        assert options["--num_processes"] == "16"
        assert options["--main_process_ip"] == "127.0.0.1"
        assert options["--deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("stage", ["label", "train"])
def test_batch_file_asks_for_cores_for_all_ranks_of_a_node(stage: str) -> None:
    """One task a node: with its one core by default, eight ranks would share that."""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", (SLURM / f"{stage}.sbatch").read_text(), re.MULTILINE))

    assert asked["ntasks-per-node"] == "1"
    assert int(asked["cpus-per-task"]) >= 8


def test_documented_command_has_a_micro_batch_for_each_rank() -> None:
    command = r"sbatch --nodes=(\d+) --gpus-per-node=(\d+) launch/slurm/train\.sbatch --config (\S+)"
    nodes, gpus, config = re.findall(command, (SLURM / "train.sbatch").read_text())[0]

    train = yaml.safe_load((ROOT / config).read_text())["train"]
    assert train["micro_batches_per_step"] % (int(nodes) * int(gpus)) == 0


def test_a_node_that_fails_fails_the_job(tmp_path: Path, job: dict[str, str]) -> None:
    (tmp_path / "tools" / "accelerate").write_text("#!/bin/bash\n[[ $SLURM_NODEID == 0 ]]\n")

    process = subprocess.run(["bash", SLURM / "train.sbatch"], env=job, timeout=300)

    assert process.returncode == 1


def test_batch_file_names_the_folder_when_submitted_elsewhere(tmp_path: Path, job: dict[str, str]) -> None:
    (tmp_path / "launch").unlink()
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    (tmp_path / "launch" / "slurm" / "common.sh").write_text((SLURM / "common.sh").read_text())

    process = subprocess.run(["bash", SLURM / "train.sbatch"], env=job, capture_output=True, text=True, timeout=300)

    assert process.returncode == 1
    assert process.stderr == f"sbatch must be called in the project's folder, got {tmp_path}; cd there first\n"
