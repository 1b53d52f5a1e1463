"""Utils: files and checkpoints that are whole or absent, and what is said of a user's error."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import one_line
from torch import nn

import Distributed
import Locks
import Signals
import Utils
from Utils import load_, newest_checkpoint, save_

ENDED = 2**22 + 1  # no process has this id: Linux gives smaller ones


def trained(width=3, seed=0):
    """A net and an optimizer that holds momentum."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.rand(4, 2)).square().sum().backward()
    optimizer.step()
    return net, optimizer


def test_a_heartbeat_speaks_until_its_end(capfd):
    before = signal.getsignal(signal.SIGALRM)
    text = ""
    end = time.monotonic() + 30
    with Signals.heartbeat("scoring", every=0.02):
        while text.count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.02)
            text += capfd.readouterr().err
    capfd.readouterr()
    time.sleep(0.05)
    assert len(re.findall(r"^scoring: \d+ s so far$", text, re.MULTILINE)) >= 2
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGALRM) == before
    with pytest.raises(KeyError), Signals.heartbeat("scoring", every=0.02):
        raise KeyError
    time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("a.pt", "another.pt"):
        Utils.save_(tmp_path / name, weights={"w": torch.arange(5.0)}, epoch=1)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


def test_save_and_load_round_trip(tmp_path):
    net, optimizer = trained()
    plain = {"step": 7, "args": {"lr": 0.1, "name": "é", "none": None}, "random": {"torch": torch.get_rng_state()}}
    save_(tmp_path / "1.pt", net=net, optimizer=optimizer, **plain)
    other, other_optimizer = trained(seed=1)
    state = load_(tmp_path / "1.pt", net=other, optimizer=other_optimizer)
    assert state["step"] == 7
    assert state["args"] == plain["args"]
    assert torch.equal(state["random"]["torch"], plain["random"]["torch"])
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    for mine, theirs in zip(net.parameters(), other.parameters()):
        momentum = (optimizer.state[mine]["momentum_buffer"], other_optimizer.state[theirs]["momentum_buffer"])
        assert torch.equal(*momentum)
        assert momentum[0].abs().sum() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "x.json"

    def half(scratch):
        scratch.write_text("ne")
        raise OSError(28, "No space left on device")

    def interrupted(scratch):
        scratch.write_text("ne")
        raise KeyboardInterrupt

    Utils.write_atomically(file, lambda scratch: scratch.write_text("old"))
    one_line(lambda: Utils.write_atomically(file, half), str(file), "No space left")
    with pytest.raises(KeyboardInterrupt):
        Utils.write_atomically(file, interrupted)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    file = tmp_path / "bank.lock"
    flock = Locks.fcntl.flock
    calls = []

    def late(handle, how):
        calls.append(how)
        if len(calls) == 1:  # the holder removes the file, just after it was opened here
            file.unlink()
        flock(handle, how)

    monkeypatch.setattr(Locks.fcntl, "flock", late)
    with Locks.locked(file, "filling it"):
        assert file.exists()
    assert len(calls) >= 2


def test_an_error_of_a_group_of_processes_shows_its_cause():
    text = Utils.explain(RuntimeError("NCCL error in: x.cu:7\n" + "z" * 500 + "\nerror creating shared memory segment"))
    assert text.startswith("another process of this run has ended")
    assert "NCCL error in: x.cu:7" in text
    assert text.endswith("error creating shared memory segment)")
    assert "\n" not in text


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_memory_that_runs_out_beside_the_allocator_is_one_line(text):
    assert "lower --bs" in Utils.explain(RuntimeError(text))


def test_flags_of_an_older_version_are_read_under_their_present_names():
    stored = {"m": "4,2", "normalise": True, "compile": "auto", "camnet": "--m 4,2 --models_dir=a --m=8"}
    now = {
        "candidates": "4,2",
        "normalize": True,
        "compile": False,
        "objective": "cimle",
        "camnet": "--candidates 4,2 --models_dir=a --candidates=8",
    }
    assert Utils.current_flags(stored) == Utils.current_flags(now) == now


def test_scratch_files_are_judged_by_the_processes_of_their_own_machine(tmp_path, monkeypatch):
    names = []
    for host in ("node1", "node2"):  # the second is this one
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        Utils.machine.cache_clear()
        Utils.write_atomically(tmp_path / "3.pt", lambda scratch: names.append(scratch.name) or scratch.touch())
    theirs, ours = [tmp_path / name.replace(str(os.getpid()), str(ENDED)) for name in names]
    their_old = theirs.with_name(theirs.name.replace("3.pt", "2.pt"))
    of_an_older_version = tmp_path / f".4.pt.{ENDED}.tmp"
    for path in (theirs, ours, their_old, of_an_older_version):
        path.touch()
    os.utime(their_old, (0, 0))
    Utils.remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {tmp_path / "3.pt", theirs}
    monkeypatch.undo()
    Utils.machine.cache_clear()


def test_a_lock_where_there_is_no_folder_is_one_line(tmp_path):
    one_line(lambda: Locks.locked(tmp_path / "absent" / "bank", "filling it").__enter__(), "cannot lock", "absent")


def test_a_lock_tells_who_holds_it_and_leaves_no_file(tmp_path):
    file = tmp_path / "lock"
    with Locks.locked(file, "filling it"):
        refused = Locks.locked(file, "filling it", wait=False)
        one_line(refused.__enter__, f"another process ({os.getpid()} on", "filling it")
    assert not file.exists()


HERE = socket.gethostname()


@pytest.mark.parametrize(
    "holder, is_free",
    [
        ("", True),
        ("half a li", True),
        (f"{ENDED} on {HERE}", True),
        (f"{os.getpid()} on {HERE}", True),  # of a container that was started again
        (f"{os.getppid()} on {HERE}", False),
        (f"{ENDED} on another-{HERE}", False),
    ],
    ids=["empty", "damaged", "ended", "own number", "alive", "another machine"],
)
def test_where_a_disk_has_no_locks_their_files_tell_who_works(tmp_path, monkeypatch, holder, is_free):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(Locks.fcntl, "flock", refuse)
    file = tmp_path / "lock"
    file.write_text(holder)
    lock = Locks.locked(file, "filling it")
    if is_free:
        with lock:
            assert file.read_text() == f"{os.getpid()} on {HERE}\n"
        assert not file.exists()
    else:
        one_line(lock.__enter__, f"another process ({holder}) is filling it", f"remove {file}")
        assert file.read_text() == holder


@pytest.mark.parametrize(
    "error, part",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory: lower --bs"),
        (MemoryError(), "out of memory: lower --bs"),
        (OSError(errno.ENOSPC, "No space left", "x.pt"), "cannot write x.pt: No space left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: lower --bs"),
        (RuntimeError("unable to allocate shared memory(shm)"), "--n_workers 0"),
        (OSError(errno.ENOENT, "No such file", "x.pt"), None),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_errors_of_the_machine_are_explained_and_those_of_the_program_are_not(error, part):
    message = Utils.explain(error)
    if part is None:
        assert message is None
    else:
        assert part in message
        assert "\n" not in message


def test_names_from_outside_are_shown_as_one_harmless_line():
    assert Utils.shown("Fotos/é 日本") == "Fotos/é 日本"
    assert Utils.shown("a\nb\x1b[2J\u202ec") == "a\\nb\\x1b[2J\\u202ec"
    assert Utils.shown(os.fsdecode(b"\xff.png")) == "\\xff.png"
    assert Utils.shown("\ud800 of a JSON file") == "\\ud800 of a JSON file"


def test_an_error_is_one_line_whatever_is_in_it(monkeypatch, capsys):
    def fail(args):
        raise Utils.UserError("Models/a\x1b[2J\nb: no")

    with pytest.raises(SystemExit):
        Utils.run_script(fail, dict)
    assert capsys.readouterr().err.endswith("error: Models/a\\x1b[2J\\nb: no\n")


def test_saving_where_there_is_no_folder_is_one_line(tmp_path):
    one_line(lambda: save_(tmp_path / "no" / "1.pt", step=1), str(tmp_path / "no" / "1.pt"))


def test_load_is_strict_and_names_what_does_not_fit(tmp_path):
    net, optimizer = trained()
    save_(tmp_path / "1.pt", net=net, optimizer=optimizer)
    one_line(lambda: load_(tmp_path / "1.pt", net=nn.Sequential(nn.Linear(2, 3))), "net", "1.running_mean")
    one_line(lambda: load_(tmp_path / "1.pt", net=trained(width=5)[0]), "net", "0.weight", "[5, 2]", "[3, 2]")
    one_line(lambda: load_(tmp_path / "1.pt", optimizer=torch.optim.SGD([torch.ones(1)], 0.1)), "optimizer")
    one_line(lambda: load_(tmp_path / "1.pt", head=net), "head")


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "executable"])
def test_load_of_what_is_no_checkpoint_is_one_line(tmp_path, damage):
    file = tmp_path / "1.pt"
    if damage == "truncated":
        save_(file, net=trained()[0])
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "foreign":
        torch.save([1, 2], file)
    elif damage == "executable":
        torch.save({"args": Namespace(lr=1)}, file)
    elif damage != "missing":
        file.write_text("" if damage == "empty" else "weights")
    one_line(lambda: load_(file, net=trained()[0]), str(file))


def test_newest_checkpoint_counts_and_passes_over_what_cannot_be_continued(tmp_path, capsys):
    assert newest_checkpoint(tmp_path) is None
    parts = {name: kind() for name, kind in Utils.ENCODER_PARTS.items()}
    for name in ("9.pt", "10.pt", "10+2.pt", "10+11.pt", "best.pt"):
        save_(tmp_path / name, **parts)
    assert newest_checkpoint(tmp_path).name == "10+11.pt"
    (tmp_path / "10+11.pt").write_bytes(b"")
    assert newest_checkpoint(tmp_path).name == "10+2.pt"
    assert str(tmp_path / "10+11.pt") in capsys.readouterr().out
    del parts["optimizer"]
    save_(tmp_path / "10+2.pt", **parts)
    assert newest_checkpoint(tmp_path).name == "10.pt"
    assert "holds no run" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_not_loaded(tmp_path):
    save_(tmp_path / "1.pt", encoder={"weight": torch.tensor([1.0, float("nan")])})
    one_line(lambda: load_(tmp_path / "1.pt"), "numbers in its encoder are not finite")


def test_other_processes_leave_a_shared_mistake_to_the_first(monkeypatch, capsys):
    def fail(args):
        raise Utils.UserError("--bs 33: no")

    for name in Distributed.LAUNCHED:
        monkeypatch.setenv(name, "1")
    waited = []
    monkeypatch.setattr(Utils.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            Utils.run_script(fail, dict)
        assert caught.value.code == 2
        assert "error: --bs 33: no\n" in capsys.readouterr().err
    assert waited == [(5, "")]  # rank 1 alone, and before it says anything


@pytest.mark.parametrize(
    ("file", "content", "cores"),
    [
        ("cpu.max", "250000 100000\n", 2),
        ("cpu.max", "50000 100000\n", 1),
        ("cpu.max", "max 100000\n", 3),
        ("cpu/cpu.cfs_quota_us", "200000\n", 2),
        ("cpu/cpu.cfs_quota_us", "-1\n", 3),
    ],
)
def test_usable_cores_counts_siblings_once_and_keeps_to_the_quota(tmp_path, monkeypatch, file, content, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    for cpu, siblings in enumerate(("0-1", "0-1", "2", "3")):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    cgroup = tmp_path / "sys/fs/cgroup"
    (cgroup / "cpu").mkdir(parents=True)
    (cgroup / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (cgroup / file).write_text(content)
    assert Utils.usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("given", "threads"), [(None, [3]), ("1", [])])
def test_threads_are_the_usable_cores_unless_the_environment_names_them(monkeypatch, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(Utils, "usable_cores", lambda: 3)
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    Utils.set_threads()
    assert calls == threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for glibc")
def test_freed_memory_is_used_again():
    program = """if True:
        import resource, torch, Utils
        Utils.keep_memory()
        for turn in range(8):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            both = torch.zeros(2**23), torch.zeros(2**22)
            del both
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=Utils.ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # pages; the 48 MiB have 12,288


def test_a_link_is_followed_and_a_pipe_stays_a_pipe(tmp_path):
    target = tmp_path / "target.json"
    target.write_text("old")
    (tmp_path / "link.json").symlink_to(target)
    Utils.write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    Utils.write_json(pipe, {"a": 2})
    assert json.loads(os.read(reader, 100)) == {"a": 2}
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "target.json"]


PRINTING = """
import sys
from pathlib import Path
import Utils

def main(args):
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3000):
            print("a line of a run", file=stream, flush=True)
    Path(sys.argv[1]).write_text("done")

Utils.run_script(main, lambda: None)
"""


@pytest.mark.parametrize("place", ["a pipe that closes", "no streams"])
def test_a_script_goes_on_when_nobody_reads_what_it_prints(tmp_path, place):
    script = tmp_path / "script.py"
    script.write_text(PRINTING)
    command = [sys.executable, str(script), str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(Path(Utils.__file__).parent)}
    if place == "no streams":
        shell = subprocess.run(
            ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=environment, cwd=tmp_path, timeout=60
        )
        code = shell.returncode
    else:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe)
        assert process.stdout.readline() == b"a line of a run\n"
        process.stdout.close()
        process.stderr.close()
        code = process.wait(timeout=60)
    assert code == 0
    assert (tmp_path / "file").read_text() == "done"


def test_what_may_not_be_read_is_not_called_unwritable():
    message = Utils.explain(PermissionError(errno.EACCES, "Permission denied", "/closed/x"))
    assert "/closed/x: Permission denied" in message
    assert "cannot write" not in message


def test_home_folders_are_found_and_an_unknown_user_is_no_error(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert Utils.expanded("~/x") == "/somewhere/x"
    assert Utils.expanded("~no-such-user/x") == "~no-such-user/x"
