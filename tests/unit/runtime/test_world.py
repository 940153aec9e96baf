"""Where a program finds itself, whether there is work for its ranks, and the environment that it gives to others."""

import logging
from pathlib import Path

import pytest

from qad_dist.runtime.world import World, check_micro_batches, count_gpus, current_world, program_environment
from shards.errors import WorldError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_world_without_a_launcher_is_one_main_rank():
    assert current_world() == World(rank=0, local_rank=0, world_size=1)
    assert current_world().is_main


def test_world_is_what_the_launcher_says(monkeypatch):
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)

    assert current_world() == World(rank=9, local_rank=1, world_size=16)
    assert not current_world().is_main


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, r"^RANK must be a whole number, got 'x'; unset it"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"must fit together, got 2, 0 and 2; start the program with"),
        ({"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, r"must fit together, got 0, 1 and 2"),
        ({"WORLD_SIZE": "0"}, r"must fit together, got 0, 0 and 0"),
    ],
)
def test_world_refuses_variables_that_contradict_each_other(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(WorldError, match=message):
        current_world()


@pytest.mark.parametrize("rank", [0, 8, 15])
def test_more_ranks_than_micro_batches_are_refused_on_every_rank(rank):
    message = (
        r"^train\.micro_batches_per_step must be at least the number of ranks \(16\), got 8; "
        r"raise it or start fewer with --num_processes$"
    )

    with pytest.raises(WorldError, match=message):
        check_micro_batches(World(rank=rank, local_rank=rank % 8, world_size=16), 8)


@pytest.mark.parametrize(
    ("rank", "world_size", "micro_batches", "warnings"),
    [(0, 8, 8, 0), (0, 4, 8, 0), (0, 1, 3, 0), (0, 6, 8, 1), (5, 6, 8, 0)],
)
def test_steps_that_leave_some_ranks_one_short_are_told_once(caplog, rank, world_size, micro_batches, warnings):
    with caplog.at_level(logging.WARNING):
        check_micro_batches(World(rank=rank, local_rank=rank, world_size=world_size), micro_batches)

    assert len(caplog.messages) == warnings
    for message in caplog.messages:
        assert message.startswith("event=uneven_steps ranks=6 micro_batches_per_step=8 ")
        assert "4 of them have one micro-batch less" in message  # 8 = 2 + 2 + 1 + 1 + 1 + 1


@pytest.mark.parametrize(("visible", "gpus"), [("", 0), ("-1", 0), ("3", 1), ("0,1,2", 3), ("GPU-a,GPU-b", 2)])
def test_count_gpus_follows_the_visible_devices(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert count_gpus() == gpus


def test_count_gpus_asks_the_driver(monkeypatch, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n[ \"$1\" = -L ] && printf 'GPU 0: A (UUID: x)\\nGPU 1: B (UUID: y)\\n'\n")
    driver.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert count_gpus() == 2
    driver.unlink()
    assert count_gpus() == 0


def test_programs_on_the_cpu_get_deepspeed_on_the_cpu_and_never_the_variable_that_turns_it_off(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    environment = program_environment(Path("runs/x"), on_cpu=True, offline=True)

    assert (environment["DS_ACCELERATOR"], environment["OMP_NUM_THREADS"]) == ("cpu", "1")
    assert "ACCELERATE_USE_CPU" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["TORCH_EXTENSIONS_DIR"] == str(Path.cwd() / "runs/x/.torch_extensions")


def test_programs_on_gpus_may_ask_the_hub_and_choose_their_accelerator(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    environment = program_environment(Path("runs/x"), on_cpu=False, offline=False)

    assert "DS_ACCELERATOR" not in environment
    assert "HF_HUB_OFFLINE" not in environment
