import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from shards import faults
from shards.errors import ConfigError
from shards.faults import FaultError, fault_point, parse_fault

_PROGRAM = """
from shards.faults import fault_point
for shard in range(4):
    print(shard, flush=True)
    fault_point("pack.after_shard", shard=shard)
fault_point("pack.before_index")
print("end", flush=True)
"""


def start(value: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "QAD_FAULT": value}
    return subprocess.Popen([sys.executable, "-c", _PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_process_kills_itself_at_the_point_whose_conditions_hold():
    with start("kill@pack.after_shard,shard=2") as process:
        output, _ = process.communicate(timeout=60)

    assert (process.returncode, output.split()) == (-signal.SIGKILL, ["0", "1", "2"])


def test_a_stopped_process_goes_on_when_it_is_told_to():
    with start("stop@pack.before_index") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)

    assert (process.returncode, output.split()) == (0, ["0", "1", "2", "3", "end"])


def test_the_variable_is_read_when_a_process_starts_and_nothing_happens_without_it(monkeypatch):
    monkeypatch.setenv("QAD_FAULT", "raise@here")
    fault_point("here")

    monkeypatch.setattr(faults, "_TEXT", "raise@here")
    fault_point("there")
    with pytest.raises(FaultError, match="QAD_FAULT asked for a fault at here"):
        fault_point("here")


def test_a_full_disk_is_the_error_of_the_system():
    with pytest.raises(OSError, match="No space left on device") as raised:
        parse_fault("enospc@here").meet("here", {})

    assert raised.value.errno == errno.ENOSPC


def test_sleep_waits_as_long_as_it_says_and_goes_on(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    parse_fault("sleep=2.5@here").meet("here", {})

    assert slept == [2.5]


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        ("raise@here", True),
        ("raise@there", False),
        ("raise@here,shard=3", True),
        ("raise@here,shard=03", False),
        ("raise@here,shard=4", False),
        ("raise@here,shard=3,name=a=b", True),
        ("raise@here,shard=3,name=other", False),
        ("raise@here,rank=None", False),
        ("raise@here,name=", False),
    ],
)
def test_a_point_is_met_when_its_name_and_every_condition_hold_as_text(text, is_met):
    where = {"shard": 3, "name": "a=b"}
    if not is_met:
        parse_fault(text).meet("here", where)
        return
    with pytest.raises(FaultError, match="at here"):
        parse_fault(text).meet("here", where)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be <action>@<point>"),
        ("kill", "must be <action>@<point>"),
        ("kill@", "must be <action>@<point>"),
        ("kill@here,", "must be <action>@<point>"),
        ("kill@here,shard", "must be <action>@<point>"),
        ("kill@here,=3", "must be <action>@<point>"),
        ("@here", "must name one of kill, stop, raise, enospc, sleep=<seconds>, got ''"),
        ("die@here", "must name one of .*, got 'die'"),
        ("kill=9@here", "must name one of .*, got 'kill=9'"),
        ("sleep@here", "must name one of .*, got 'sleep'"),
        ("sleep=@here", "must name one of .*, got 'sleep='"),
        ("sleep=-1@here", "must name one of .*, got 'sleep=-1'"),
        ("sleep=inf@here", "must name one of .*, got 'sleep=inf'"),
        ("sleep=nan@here", "must name one of .*, got 'sleep=nan'"),
    ],
)
def test_a_mistake_in_the_variable_is_told_at_any_point(monkeypatch, text, message):
    monkeypatch.setattr(faults, "_TEXT", text)

    with pytest.raises(ConfigError, match=f"^QAD_FAULT {message}"):
        fault_point("elsewhere")
