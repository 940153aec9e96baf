"""Who works on which shard: claims in a shared folder, without a word between the processes that share it.

A claim is the file ``<shard>.<generation>.claim``, which only one process can create; the highest generation counts.
Its owner counts up in ``<owner>.beat`` while its work makes progress. A process that has nothing else to do watches the
claims of the others: one whose owner is seen to have died on this machine, or whose count was seen to stand still for
``stale_seconds`` by its own clock, is stale, and whoever creates the next generation has the shard. Times of files are
never looked at: clocks of machines differ, and shared file systems blur them.

A stopped process may go on after its claim was taken, and shared file systems may show late that a shard is done. So
the work on a shard must give equal bytes whoever does it, and appear by a rename: then all that a lost claim costs is
work that is done twice. With that, processes may begin late, be killed or stopped anywhere, and belong to several jobs.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

from shards.faults import fault_point

_CLAIM, _BEAT = ".claim", ".beat"
_BEATS_IN_STALE, _LOOKS_IN_STALE = 10, 20
# One who was stopped has looked at nothing meanwhile: however long ago the last look was, it takes so many more.
_LOOKS_TO_STEAL = 4
# Between two looks of one who waits: most shards that others hold are done soon, and a look costs little.
_LEAST_SECONDS_ASLEEP, _MOST_SECONDS_ASLEEP, _ASLEEP_GROWS = 0.05, 5.0, 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process that claims; what tells it from all others on its machine is known on Linux only."""

    name: str
    """Unique: no other start of a program has it."""
    boot: str | None
    """Of its machine, since that was started."""
    namespace: str | None
    """In which ``pid`` counts: containers have their own."""
    pid: int
    started: str | None
    """When, in ticks since the boot: numbers of processes come again."""

    @classmethod
    def of_this_process(cls, name: str) -> "Owner":
        """This process, under a name that it makes unique."""
        pid = os.getpid()
        return cls(
            name=f"{name}-{uuid.uuid4().hex[:12]}",
            boot=_text_of(Path("/proc/sys/kernel/random/boot_id")),
            namespace=_namespace(),
            pid=pid,
            started=_state_and_start(pid)[1],
        )

    def is_known_dead(self) -> bool:
        """Whether it ran where this process runs, and does no more."""
        here = (_text_of(Path("/proc/sys/kernel/random/boot_id")), _namespace())
        if None in here or here != (self.boot, self.namespace):
            return False
        try:
            os.kill(self.pid, 0)  # also where /proc shows no processes of others
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, started = _state_and_start(self.pid)
        return state in ("Z", "X") or (None not in (started, self.started) and started != self.started)


class _Claim(NamedTuple):
    shard: str
    generation: int


@dataclass(slots=True)
class _Watch:
    pulse: tuple[bytes | None, bytes | None]
    looked: float
    quiet_seconds: float = 0.0


class Claims:
    """The claims of one process, one at a time. Leave its block to give up the one that it has.

    Only the thread that works may call it: a thread of its own would go on to beat for a process that hangs.
    """

    def __init__(
        self,
        folder: Path,
        owner_name: str,
        stale_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Look at nothing yet.

        Args:
            folder: Of the claims; all who share the work name the same. Made when needed, gone when all is done.
            owner_name: For readers of the folder, such as ``rank-3``; need not be unique.
            stale_seconds: For which the count of a claim's owner must stand still before the shard is taken from it.
            clock: Seconds that never go back.
            sleep: Waits for some seconds.
        """
        self._folder, self._stale_seconds = folder, stale_seconds
        self._clock, self._sleep = clock, sleep
        self.owner = Owner.of_this_process(owner_name)
        self._held: _Claim | None = None
        self._num_beats, self._beaten = 0, 0.0
        self._watched: dict[_Claim, _Watch] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def take(self, order: Sequence[str], is_done: Callable[[str], bool]) -> Iterator[str]:
        """Claim one shard after the other until all are done; each is given up when the next one is asked for.

        First what nobody has, then what is stale. When others have all the rest it waits for them, to take over from
        those that die. A shard that was given counts as done when the next one is asked for.

        Args:
            order: The shards, those first that this process should begin with.
            is_done: Whether there is nothing left to do for a shard. Asked before and after it is claimed: between a
                look at the folder and a claim another process may have finished.

        Raises:
            OSError: The folder cannot be made or written to.
        """
        self._release()
        pending, asked = dict.fromkeys(order), set[str]()
        asleep = _LEAST_SECONDS_ASLEEP
        while pending:
            claims = self._read_folder()
            for shard in [shard for shard in pending if shard in claims and shard not in asked]:
                asked.add(shard)  # once: while its owner works there is no need to ask again
                if is_done(shard):
                    del pending[shard]
            if (claimed := self._claim_next(pending, claims, is_done)) is not None:
                fault_point("label.after_claim", shard=claimed)
                yield claimed
                fault_point("label.before_release", shard=claimed)
                self._release()
                del pending[claimed]
                asleep = _LEAST_SECONDS_ASLEEP
            elif pending:
                self._sleep(min(asleep, self._stale_seconds / _LOOKS_IN_STALE, _MOST_SECONDS_ASLEEP))
                asleep *= _ASLEEP_GROWS
        self._tidy(set(order))

    def beat(self) -> None:
        """Tell the others that the work goes on. Cheap: writes a few times in ``stale_seconds`` at most."""
        now = self._clock()
        if self._held is None or now - self._beaten < self._stale_seconds / _BEATS_IN_STALE:
            return
        self._num_beats, self._beaten = self._num_beats + 1, now
        # Not by a rename: a half-written count is another one, too, and a kill leaves nothing behind. The folder is
        # gone if this process was stopped until others had finished.
        with suppress(FileNotFoundError):
            self._beat_path(self.owner.name).write_text(str(self._num_beats))

    def _claim_next(
        self, pending: dict[str, None], claims: dict[str, int], is_done: Callable[[str], bool]
    ) -> str | None:
        """Claim what nobody has, else what is stale; what turns out to be done is removed from ``pending``."""
        free = [shard for shard in pending if shard not in claims]
        held = [_Claim(shard, claims[shard]) for shard in pending if shard in claims]
        stale = (claim.shard for claim in held if self._is_stale(claim))
        for shard in chain(free, stale):
            if is_done(shard):
                del pending[shard]
            elif self._create(_Claim(shard, claims.get(shard, -1) + 1)):
                if not is_done(shard):
                    return shard
                self._release()
                del pending[shard]
        return None

    def _create(self, claim: _Claim) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._claim_path(claim)
        try:
            file = path.open("xb")
        except FileExistsError:
            return False
        except FileNotFoundError:  # others had finished and removed the folder; another look will tell
            return False
        self._held, self._beaten = claim, self._clock()
        with file:
            file.write(json.dumps(asdict(self.owner), sort_keys=True).encode())
        return True

    def _release(self) -> None:
        """Remove this process's claim and those that it was stolen from, lowest first: the shard is never without."""
        if self._held is None:
            return
        claim, self._held = self._held, None
        for generation in range(claim.generation + 1):
            self._remove(_Claim(claim.shard, generation))
        self._beat_path(self.owner.name).unlink(missing_ok=True)

    def _remove(self, claim: _Claim) -> None:
        owner = _owner_of(self._read(self._claim_path(claim)))
        self._claim_path(claim).unlink(missing_ok=True)
        if owner is not None:  # if it lives after all, its next beat is a file again
            self._beat_path(owner.name).unlink(missing_ok=True)

    def _tidy(self, done: set[str]) -> None:
        """Remove what dead owners left: claims of shards that are done, counts that belong to no claim, the folder."""
        remaining = set()
        for claim in self._list():
            if claim.shard in done:
                self._remove(claim)
            elif (owner := _owner_of(self._read(self._claim_path(claim)))) is not None:
                remaining.add(owner.name)
        with suppress(OSError):  # another job works with it, or tidies up as well
            for path in self._folder.glob(f"*{_BEAT}"):
                if path.name.removesuffix(_BEAT) not in remaining:
                    path.unlink(missing_ok=True)
            self._folder.rmdir()

    def _is_stale(self, claim: _Claim) -> bool:
        """Look at a claim; whether it was seen unchanged for long enough, or its owner is known to be dead."""
        content = self._read(self._claim_path(claim))
        owner = _owner_of(content)
        if owner is not None and owner.is_known_dead():
            return True
        # Without an owner, the claim is being written, or its owner died before that: watched like any other.
        pulse = (content, None if owner is None else self._read(self._beat_path(owner.name)))
        now = self._clock()
        watch = self._watched.get(claim)
        if watch is None or watch.pulse != pulse:
            self._watched[claim] = _Watch(pulse, now)
            return False
        watch.quiet_seconds += min(now - watch.looked, self._stale_seconds / _LOOKS_TO_STEAL)
        watch.looked = now
        return watch.quiet_seconds >= self._stale_seconds

    def _read_folder(self) -> dict[str, int]:
        """The highest generation of each shard that is claimed."""
        return {claim.shard: claim.generation for claim in sorted(self._list())}

    def _list(self) -> set[_Claim]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return set()
        parts = [name.removesuffix(_CLAIM).rpartition(".") for name in names if name.endswith(_CLAIM)]
        return {_Claim(shard, int(generation)) for shard, _, generation in parts if generation.isdecimal()}

    def _claim_path(self, claim: _Claim) -> Path:
        return self._folder / f"{claim.shard}.{claim.generation}{_CLAIM}"

    def _beat_path(self, owner_name: str) -> Path:
        return self._folder / f"{owner_name}{_BEAT}"

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def _owner_of(content: bytes | None) -> Owner | None:
    try:
        return Owner(**json.loads(content or b""))
    except (ValueError, TypeError):
        return None


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _state_and_start(pid: int) -> tuple[str | None, str | None]:
    """A process's state and when it was started, as the kernel tells them; None where it does not."""
    text = _text_of(Path(f"/proc/{pid}/stat"))
    if text is None:
        return None, None
    # The name of the program stands in brackets before them and may hold anything, brackets too.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
