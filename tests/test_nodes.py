"""Who fetches what all ranks need: one process a machine, machines that share a disk in turn."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ENV, GRACE, ROOT
from test_hub import PUZZLES, START, hub  # noqa: F401 (a fixture)

from harness import nodes

# Every process a machine of its own, on the worst of shared disks: each sees its own flocks alone,
# which are those of the hub's client and of datasets too
A_MACHINE_EACH = """
import fcntl, os
from harness import nodes
fcntl.flock = lambda *args: None
nodes.boot = lambda: str(os.getpid())
"""


def start(envs, flags, expected):
    """What each of several ranks prints: of START, for the model org/model and these flags, in a
    process with that environment."""
    began = []
    for env in envs:
        command = [sys.executable, "-c", A_MACHINE_EACH + START, json.dumps([flags])]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        began.append(subprocess.Popen(command, cwd=ROOT, env=ENV | env, **options))
    printed = [process.communicate(timeout=200)[0] for process in began]
    for process, text in zip(began, printed, strict=True):
        assert process.returncode == 0 and expected in text, text
    return printed


def ranks_of(*local_ranks):
    """The environments of a process group, rank after rank."""
    from forks import free_port

    port = str(free_port())
    found = []
    for rank, local_rank in enumerate(local_ranks):
        env = dict(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(len(local_ranks)))
        found.append(env | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    return found


@pytest.mark.slow
def test_one_rank_of_a_node_fetches_and_the_other_needs_no_hub(hub, tmp_path):  # noqa: F811
    first, second = ranks_of(0, 1)
    # The second rank's hub is a port where nobody listens
    home = hub.env(tmp_path / "home")
    first, second = first | home, second | home | dict(HF_ENDPOINT="http://127.0.0.1:9")
    start([first, second], [], f"folder {tmp_path}/home/hub/")
    assert sum("/storage/" in path for path in hub.downloads()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes_fetch_once_a_disk(hub, tmp_path, shared):  # noqa: F811
    """Two first ranks of their nodes, which start at once: with one cache for both, of which one
    downloads and the other finds it; with a cache on each."""
    first, second = ranks_of(0, 0)
    first |= hub.env(tmp_path / "0")
    second |= hub.env(tmp_path / ("0" if shared else "1"))
    printed = "".join(start([first, second], PUZZLES, "rows 256 128"))
    assert sum("/storage/" in path for path in hub.downloads()) == (1 if shared else 2)
    assert ("is fetching it; waiting for that" in printed) == shared
    assert not list((tmp_path / "0").rglob("lad--*")), "a lock was left"


# ==== The lock itself ===========================================================================


class Clock:
    """time, for the module: it goes on when somebody sleeps, and something happens meanwhile."""

    def __init__(self, meanwhile):
        self.now = 0.0
        self.meanwhile = meanwhile

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile(self.now)


def made_elsewhere(path):
    """A lock as another machine's process makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(host="elsewhere", boot="another", pid=7)))


def test_the_turn_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path):
    path = tmp_path / "locks/a.lock"
    holder = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from harness import nodes
with nodes.turn(Path({str(path)!r}), "a"):
    print("mine", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    assert nodes.make(path) is None and nodes.inherit(path) is None  # while it lives
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with nodes.turn(path, "a"):
        assert nodes.read_owner(path)["pid"] == os.getpid()
        assert time.monotonic() - began < GRACE < nodes.SILENT
    assert not path.exists()


def test_a_living_machine_keeps_its_turn(monkeypatch, tmp_path, capsys):
    path = tmp_path / "locks/a.lock"
    made_elsewhere(path)

    def work(now):
        """Ten times as long as silence may last, with a sign of life every minute."""
        if now < 10 * nodes.SILENT:
            os.utime(path, (now // 60, now // 60))
        elif path.exists():
            path.unlink()

    monkeypatch.setattr(nodes, "time", Clock(work))
    with nodes.turn(path, "org/model"):
        assert nodes.time.now >= 10 * nodes.SILENT
    said = capsys.readouterr().out.splitlines()
    assert said == ["hub       org/model: process 7 on elsewhere is fetching it; waiting for that"]


def test_a_silent_machine_loses_its_turn(monkeypatch, tmp_path):
    path = tmp_path / "locks/a.lock"
    made_elsewhere(path)
    monkeypatch.setattr(nodes, "time", Clock(lambda now: None))
    with nodes.turn(path, "org/model"):
        assert nodes.SILENT < nodes.time.now < nodes.SILENT + nodes.SETTLE + 2
        assert nodes.read_owner(path)["pid"] == os.getpid()
    assert os.listdir(path.parent) == []


def test_of_two_that_take_over_at_once_one_has_the_turn(monkeypatch, tmp_path):
    """Both have seen that the owner is silent; the second moves its file into place while the
    first one waits for just that."""
    path = tmp_path / "a.lock"
    made_elsewhere(path)
    sign = nodes.sign_of_life(path)
    monkeypatch.setattr(nodes, "sign_of_life", lambda path: sign)
    second = []

    def meanwhile(now):
        if not second:
            second.append(None)  # this is called again while the second one waits
            second[0] = nodes.take_over(path, sign)

    monkeypatch.setattr(nodes, "time", Clock(meanwhile))
    assert nodes.take_over(path, sign) is None
    assert nodes.is_ours(second[0], path)


def test_who_has_spoken_again_is_not_taken_over(tmp_path):
    path = tmp_path / "a.lock"
    made_elsewhere(path)
    sign = nodes.sign_of_life(path)
    os.utime(path, (1, 1))
    assert nodes.take_over(path, sign) is None
    assert nodes.read_owner(path)["pid"] == 7 and os.listdir(tmp_path) == ["a.lock"]


def test_who_was_taken_for_dead_does_not_end_the_others_turn(tmp_path):
    path = tmp_path / "a.lock"
    with nodes.turn(path, "a"):
        path.unlink()
        made_elsewhere(path)
    assert nodes.read_owner(path)["pid"] == 7


def test_signs_of_life_are_given(monkeypatch, tmp_path):
    monkeypatch.setattr(nodes, "BEAT", 0.01)
    path = tmp_path / "a.lock"
    with nodes.turn(path, "a"):
        os.utime(path, (1, 1))
        end = time.monotonic() + GRACE
        while path.stat().st_mtime == 1:
            assert time.monotonic() < end, "nobody touched it"
            time.sleep(0.01)


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    with nodes.turn(tmp_path / "file/a.lock", "a"):
        pass


def test_an_error_ends_the_turn(tmp_path):
    with pytest.raises(ZeroDivisionError), nodes.turn(tmp_path / "a.lock", "a"):
        raise ZeroDivisionError
    assert not (tmp_path / "a.lock").exists()


def test_all_ranks_leave_where_the_fetch_fails(capsys):
    def fetch():
        raise SystemExit(2)

    with pytest.raises(SystemExit) as stop:
        nodes.fetch_once(fetch, "org/nothing")
    assert stop.value.code == 2
