"""Claims: who gets which shard, when one is taken away, and what becomes of it when processes die or stop."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest

from shards.claims import Claims, Owner

STALE_SECONDS = 100.0


class Machine:
    """A clock that moves when somebody sleeps, and at whose ticks something may happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at_tick: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= STALE_SECONDS / 10
        self.now += seconds
        self.at_tick()


@pytest.fixture
def machine() -> Machine:
    return Machine()


def claims_of(folder: Path, name: str, machine: Machine) -> Claims:
    return Claims(folder / "claims", name, STALE_SECONDS, clock=lambda: machine.now, sleep=machine.sleep)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_owner() -> Owner:
    """Of a process of this machine that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return replace(Owner.of_this_process("dead"), pid=process.pid, started="1")


def nothing_done(_: str) -> bool:
    return False


def test_one_process_gets_every_shard_in_its_order_and_leaves_no_file(tmp_path, machine):
    done: set[str] = {"c.tar"}
    given = []
    with claims_of(tmp_path, "rank-0", machine) as claims:
        for shard in claims.take(["b.tar", "c.tar", "a.tar", "d.tar"], done.__contains__):
            assert names_in(tmp_path / "claims") == [f"{shard}.0.claim"]
            machine.now += STALE_SECONDS
            claims.beat()
            given.append(shard)
            done.add(shard)

    assert given == ["b.tar", "a.tar", "d.tar"]
    assert machine.now == 3 * STALE_SECONDS  # it never waited
    assert not (tmp_path / "claims").exists()


def test_what_another_has_is_left_to_it_and_waited_for(tmp_path, machine):
    done: set[str] = set()
    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        own = first.take(["x", "y", "z"], done.__contains__)
        assert next(own) == "x"
        others = second.take(["x", "y", "z"], done.__contains__)
        assert next(others) == "y"
        done.add("y")
        assert next(others) == "z"
        done.add("z")

        def finish_x() -> None:
            if machine.now > 50:
                done.add("x")
                assert list(own) == []

        machine.at_tick = finish_x
        assert list(others) == []

    assert 50 < machine.now < 60
    assert not (tmp_path / "claims").exists()


def test_a_claim_whose_count_stands_still_is_taken_after_stale_seconds_and_not_before(tmp_path, machine):
    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        next(first.take(["x"], nothing_done))
        machine.now = 1_000.0  # however long it was held before anybody looked

        assert next(second.take(["x"], nothing_done)) == "x"

        assert machine.now - 1_000 == pytest.approx(STALE_SECONDS, rel=0.06)
        assert machine.now - 1_000 >= STALE_SECONDS
        assert names_in(tmp_path / "claims") == ["x.0.claim", "x.1.claim"]


def test_a_claim_whose_count_moves_is_never_taken(tmp_path, machine):
    done: set[str] = set()
    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        own = first.take(["x"], done.__contains__)
        next(own)

        def go_on() -> None:
            first.beat()
            if machine.now > 50 * STALE_SECONDS:
                done.add("x")
                assert list(own) == []

        machine.at_tick = go_on

        assert list(second.take(["x"], done.__contains__)) == []

    assert machine.now > 50 * STALE_SECONDS


def test_one_beat_within_stale_seconds_is_enough(tmp_path, machine):
    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        next(first.take(["x"], nothing_done))
        last = [0.0]

        def beat_until_1000() -> None:
            if machine.now < 1_000 and machine.now - last[0] > 0.85 * STALE_SECONDS:
                last[0] = machine.now
                first.beat()

        machine.at_tick = beat_until_1000

        assert next(second.take(["x"], nothing_done)) == "x"

    assert machine.now == pytest.approx(last[0] + STALE_SECONDS, rel=0.06)
    assert last[0] > 900


def test_beats_write_a_few_times_in_stale_seconds_and_nothing_without_a_claim(tmp_path, machine):
    counts = set()
    machine.now = 1_000.0
    with claims_of(tmp_path, "other", machine) as other, claims_of(tmp_path, "a", machine) as claims:
        next(other.take(["elsewhere"], nothing_done))
        claims.beat()
        assert names_in(tmp_path / "claims") == ["elsewhere.0.claim"]
        next(claims.take(["x"], nothing_done))
        for tick in range(int(STALE_SECONDS) * 10):
            machine.now = 1_000 + tick / 10
            claims.beat()
            counts.update(path.read_text() for path in (tmp_path / "claims").glob("*.beat"))

    assert counts == {str(count) for count in range(1, 10)}
    assert names_in(tmp_path / "claims") == []


def test_a_watcher_that_was_stopped_itself_looks_again_before_it_steals(tmp_path, machine):
    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        next(first.take(["x"], nothing_done))
        beaten = []

        def freeze_both() -> None:
            if not beaten:
                machine.now += 1_000_000  # the whole machine stood still, and the watcher is the first to go on
                beaten.append(1)
            elif len(beaten) < 100:
                first.beat()
                beaten.append(1)

        machine.at_tick = freeze_both

        next(second.take(["x"], nothing_done))

    assert len(beaten) == 100


def test_of_several_thieves_one_gets_the_shard(tmp_path, machine):
    done: set[str] = set()
    with claims_of(tmp_path, "owner", machine) as owner:
        next(owner.take(["x"], nothing_done))
        thieves = [claims_of(tmp_path, f"thief-{number}", machine) for number in range(3)]
        winner = thieves[0].take(["x"], done.__contains__)
        assert next(winner) == "x"
        machine.at_tick = thieves[0].beat
        rest = thieves[1].take(["x"], done.__contains__)

        def finish_later() -> None:
            thieves[0].beat()
            if machine.now > 5 * STALE_SECONDS:
                done.add("x")
                assert list(winner) == []

        machine.at_tick = finish_later
        assert list(rest) == []

    assert list(thieves[2].take(["x"], done.__contains__)) == []
    assert not (tmp_path / "claims").exists()


def test_of_two_that_saw_a_shard_free_one_gets_it(tmp_path, machine):
    done: set[str] = set()
    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        faster = second.take(["x"], done.__contains__)
        given = []

        def is_done(shard: str) -> bool:
            """Is asked when ``first`` has looked at the folder and is about to claim."""
            if not given:
                given.append(next(faster))
            return shard in done

        def finish_x() -> None:
            done.add("x")
            assert list(faster) == []

        machine.at_tick = finish_x
        assert list(first.take(["x"], is_done)) == []

    assert given == ["x"]


def test_a_shard_that_was_stolen_can_be_stolen_again(tmp_path, machine):
    (tmp_path / "claims").mkdir()
    for generation in range(12):  # of which 9 is not the last
        (tmp_path / "claims" / f"x.{generation}.claim").write_text(json.dumps(asdict(dead_owner())))
    with claims_of(tmp_path, "a", machine) as claims:
        assert next(claims.take(["x"], nothing_done)) == "x"
        assert "x.12.claim" in names_in(tmp_path / "claims")

    assert names_in(tmp_path / "claims") == []


def test_what_nobody_has_comes_before_what_is_stale(tmp_path, machine):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "x.0.claim").write_text(json.dumps(asdict(dead_owner())))
    with claims_of(tmp_path, "a", machine) as claims:
        assert list(claims.take(["x", "y", "z"], nothing_done)) == ["y", "z", "x"]


def test_beginning_anew_gives_up_what_was_left_in_the_middle(tmp_path, machine):
    with claims_of(tmp_path, "a", machine) as claims:
        abandoned = claims.take(["x", "y"], nothing_done)
        next(abandoned)

        assert next(claims.take(["y", "x"], nothing_done)) == "y"
        assert names_in(tmp_path / "claims") == ["y.0.claim"]


def test_a_folder_that_others_remove_meanwhile_is_made_again(tmp_path, machine, monkeypatch):
    removed = []

    def make_and_lose(folder: Path, **options: bool) -> None:
        os.makedirs(folder, exist_ok=True)
        if not removed:
            folder.rmdir()
            removed.append(folder)

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    with claims_of(tmp_path, "a", machine) as claims:
        assert list(claims.take(["x"], nothing_done)) == ["x"]

    assert removed == [tmp_path / "claims"]


def test_a_shard_that_was_done_between_look_and_claim_is_not_given(tmp_path, machine):
    answers = iter([False, True])
    with claims_of(tmp_path, "a", machine) as claims:
        assert list(claims.take(["x"], lambda _: next(answers))) == []

    assert list(answers) == []
    assert not (tmp_path / "claims").exists()


def test_a_claimed_shard_is_asked_about_once_while_its_owner_works(tmp_path, machine):
    asked = Counter[str]()

    def is_done(shard: str) -> bool:
        asked[shard] += 1
        return machine.now > 3 * STALE_SECONDS

    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        own = first.take(["x"], nothing_done)
        next(own)

        def go_on() -> None:
            first.beat()
            if is_done("tick"):
                list(own)

        machine.at_tick = go_on
        assert list(second.take(["x"], is_done)) == []

    assert asked["x"] == 2  # when it was first seen, and when its claim was gone


def test_an_owner_that_died_on_this_machine_is_stale_at_once(tmp_path, machine):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "x.0.claim").write_text(json.dumps(asdict(dead_owner())))
    with claims_of(tmp_path, "a", machine) as claims:
        assert next(claims.take(["x"], nothing_done)) == "x"

    assert machine.now == 0
    assert names_in(tmp_path / "claims") == []


@pytest.mark.parametrize("change", [{"boot": "another"}, {"boot": None}, {"namespace": "pid:[1]"}, {"namespace": None}])
def test_an_owner_that_died_elsewhere_is_waited_for(tmp_path, machine, change):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "x.0.claim").write_text(json.dumps(asdict(dead_owner()) | change))
    with claims_of(tmp_path, "a", machine) as claims:
        assert next(claims.take(["x"], nothing_done)) == "x"

    assert machine.now >= STALE_SECONDS


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}'])
def test_a_claim_that_was_never_written_is_waited_for_and_taken(tmp_path, machine, content):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "x.0.claim").write_text(content)
    with claims_of(tmp_path, "a", machine) as claims:
        assert next(claims.take(["x"], nothing_done)) == "x"

    assert STALE_SECONDS <= machine.now <= 1.06 * STALE_SECONDS
    assert names_in(tmp_path / "claims") == []


def test_a_process_knows_itself_and_its_parent_to_live_and_another_one_with_a_number_of_a_dead_one():
    owner = Owner.of_this_process("a")

    assert owner.name.startswith("a-") and owner.name != Owner.of_this_process("a").name
    assert not owner.is_known_dead()
    assert replace(owner, started="1").is_known_dead()
    assert not replace(owner, started=None).is_known_dead()
    assert dead_owner().is_known_dead()


def test_leaving_the_block_by_an_error_gives_the_shard_up(tmp_path, machine):
    def fail_at_work() -> None:
        with claims_of(tmp_path, "a", machine) as claims:
            for _ in claims.take(["x", "y"], nothing_done):
                machine.now += STALE_SECONDS
                claims.beat()
                assert len(names_in(tmp_path / "claims")) == 2
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_at_work()

    assert names_in(tmp_path / "claims") == []


def test_a_process_that_lost_its_claim_gives_up_its_own_only(tmp_path, machine):
    done: set[str] = set()
    with claims_of(tmp_path, "b", machine) as second:
        with claims_of(tmp_path, "a", machine) as first:
            own = first.take(["x"], done.__contains__)
            next(own)
            taken = second.take(["x"], done.__contains__)
            next(taken)
            first.beat()

        assert names_in(tmp_path / "claims") == ["x.1.claim"]
        done.add("x")
        assert list(taken) == []


def test_a_process_whose_claim_is_gone_leaves_no_count(tmp_path, machine):
    done: set[str] = set()
    with claims_of(tmp_path, "other", machine) as other, claims_of(tmp_path, "b", machine) as second:
        next(other.take(["elsewhere"], nothing_done))
        with claims_of(tmp_path, "a", machine) as first:
            next(first.take(["x"], done.__contains__))
            for shard in second.take(["x"], done.__contains__):
                done.add(shard)
            first.beat()
            assert names_in(tmp_path / "claims") == [f"{first.owner.name}.beat", "elsewhere.0.claim"]

        assert names_in(tmp_path / "claims") == ["elsewhere.0.claim"]


def test_a_thief_that_gives_up_leaves_nothing_of_what_it_robbed(tmp_path, machine):
    with claims_of(tmp_path, "a", machine) as first:
        next(first.take(["x"], nothing_done))
        machine.now += STALE_SECONDS
        first.beat()
        with claims_of(tmp_path, "b", machine) as second:
            next(second.take(["x"], nothing_done))
            assert names_in(tmp_path / "claims") == [f"{first.owner.name}.beat", "x.0.claim", "x.1.claim"]

        assert names_in(tmp_path / "claims") == []


def test_a_process_that_goes_on_after_all_others_finished_breaks_nothing(tmp_path, machine):
    done: set[str] = set()
    with claims_of(tmp_path, "a", machine) as first, claims_of(tmp_path, "b", machine) as second:
        own = first.take(["x", "y"], done.__contains__)
        assert next(own) == "x"
        for shard in second.take(["x", "y"], done.__contains__):
            done.add(shard)
        assert not (tmp_path / "claims").exists()

        first.beat()
        assert list(own) == []

    assert not (tmp_path / "claims").exists()


def test_leftovers_of_the_dead_are_tidied_up_and_claims_of_other_work_are_kept(tmp_path, machine):
    folder = tmp_path / "claims"
    with claims_of(tmp_path, "other", machine) as other:
        next(other.take(["elsewhere"], nothing_done))
        machine.now += STALE_SECONDS
        other.beat()
        (folder / "x.0.claim").write_text(json.dumps(asdict(dead_owner())))  # killed after it was done
        (folder / "x.3.claim").write_text("")
        (folder / "gone-0123.beat").write_text("7")
        with claims_of(tmp_path, "a", machine) as claims:
            assert list(claims.take(["x"], lambda _: True)) == []

        assert names_in(folder) == sorted([f"{other.owner.name}.beat", "elsewhere.0.claim"])


def test_shards_are_given_one_at_a_time(tmp_path, machine):
    with claims_of(tmp_path, "a", machine) as claims:
        given = list(islice(claims.take(["x", "y", "z"], nothing_done), 2))

        assert given == ["x", "y"]
        assert names_in(tmp_path / "claims") == ["y.0.claim"]
