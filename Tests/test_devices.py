"""Devices.py: which GPU a process uses, and what is free on it, with answers of a GPU that is not there."""

import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import one_line

import Devices
import Distributed
import Evaluate
import Reports
import Signals


@pytest.fixture
def two_gpus(monkeypatch):
    """Let torch say that there are two GPUs; a tensor on one of them is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_gpu_is_known_by_its_index_without_touching_one(two_gpus):
    assert Devices.pick_device("auto") == torch.device("cuda")
    assert Devices.pick_device("cuda") == torch.device("cuda")
    assert Devices.pick_device("cuda:1") == torch.device("cuda:1")
    one_line(lambda: Devices.pick_device("cuda:2"), "--device cuda:2", "cuda:0 to cuda:1")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus_are_one_line(two_gpus, monkeypatch, name):
    for variable in Distributed.LAUNCHED:
        monkeypatch.setenv(variable, "1")
    assert Devices.pick_device(name) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    one_line(lambda: Devices.pick_device(name), f"--device {name}", "GPUs (2)", "--nproc_per_node=2")
    assert Devices.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["mps", "xla", "meta", "gpu", "", "cuda:"])
def test_a_device_that_is_not_there_is_a_short_line(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    line = one_line(lambda: Devices.pick_device(name), f"--device {name}", "try --device auto")
    assert len(line) < 150


def test_a_single_process_makes_its_gpu_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert Distributed.start(torch.device(name)) == (0, 1, torch.device(name))
    assert chosen == [torch.device("cuda:1")]


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert Devices.free_memory("cuda") == 500


def test_the_pace_counts_what_a_gpu_still_has_to_do(monkeypatch):
    clock = SimpleNamespace(now=0.0, waiting=0.0)  # seconds; waiting: launched but not done

    def synchronize(device):
        clock.now += clock.waiting
        clock.waiting = 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(Reports.time, "perf_counter", lambda: clock.now)
    pace = Reports.Pace(0, 100, torch.device("cuda"))
    step = 0
    known = False
    while not known:
        step += 1
        clock.now += 0.01  # to launch a step
        clock.waiting += 1.0  # to compute it
        known = pace.tick(step)
    assert pace.seconds == pytest.approx(1.01)
    assert pace.left(90) == pytest.approx(10.1)


def test_the_meter_shares_the_time_among_the_stages(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(Reports.time, "perf_counter", lambda: clock.now)
    meter = Reports.Meter(torch.device("cpu"), 10)
    for _ in range(2):  # steps
        for stage, seconds in zip(Reports.Meter.STAGES, (1.0, 2.0, 3.0, 4.0, 10.0)):
            clock.now += seconds
            meter.lap(stage)
    shares = {"time_views": 0.1, "time_forward": 0.15, "time_loss": 0.2, "time_backward": 0.5}
    assert meter.read(12, 16) == {"views_per_second": 0.8, "data_wait": 0.05} | shares  # 2 steps of 16 views in 40 s
    assert (meter.waited, meter.elapsed) == (2.0, 40.0)


@pytest.mark.parametrize("seconds, text", [(0.2, "1 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_in_words(seconds, text):
    assert Reports.duration(seconds) == text


@pytest.mark.parametrize(
    "name, on_cuda, in_words", [("fp32", False, "fp32"), ("tf32", True, "tf32"), ("auto", True, "tf32")]
)
def test_tf32_is_off_under_fp32_and_in_scores(monkeypatch, name, on_cuda, in_words):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", cudnn.allow_tf32)  # as it is, at the end
    Devices.set_precision(name, torch.device("cpu"))
    assert cudnn.allow_tf32 == on_cuda
    assert Devices.precision_name(name, False, torch.device("cuda")) == in_words
    assert Devices.precision_name(name, False, torch.device("cpu")) == "fp32"
    with Evaluate.frozen(torch.nn.Linear(2, 2)):
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32 == on_cuda


def test_a_second_ctrl_c_ends_the_program_at_once():
    with Signals.Deferred() as interruption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a launcher's, again
        assert interruption.signal == signal.SIGTERM
    with Signals.Deferred() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def write(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


@pytest.mark.parametrize(
    "group, files, free",
    [
        ("0::/", {}, 9000 * 1024),  # no limit
        ("0::/", {"memory.max": "max", "memory.current": "5"}, 9000 * 1024),
        ("0::/", {"memory.max": "7000", "memory.current": "5000"}, 2000),
        ("0::/", {"memory.max": "7000", "memory.current": "8000"}, 0),
        # page cache is free; that of tmpfs is not
        (
            "0::/",
            {
                "memory.max": "7000",
                "memory.current": "5000",
                "memory.stat": "file 900\ninactive_file 300\nactive_file 40",
            },
            2340,
        ),
        # a limit of any group around the process
        ("0::/job/step", {"job/memory.max": "7000", "job/memory.current": "6000", "job/step/memory.max": "max"}, 1000),
        ("0::/job/step", {"job/step/memory.max": "500", "job/step/memory.current": "100"}, 400),
    ],
)
def test_free_memory_is_what_a_limit_leaves(tmp_path, group, files, free):
    write(tmp_path, {"proc/meminfo": "MemTotal: 10000 kB\nMemAvailable: 9000 kB\n", "proc/self/cgroup": f"{group}\n"})
    write(tmp_path / "sys/fs/cgroup", files)
    assert Devices.free_memory("cpu", tmp_path) == free


def test_free_memory_under_version_1_of_control_groups(tmp_path):
    write(tmp_path, {"proc/meminfo": "MemAvailable: 9000 kB\n"})
    write(tmp_path, {"proc/self/cgroup": "9:cpu,cpuacct:/other\n4:memory:/docker/a\n"})
    folder = tmp_path / "sys/fs/cgroup/memory/docker/a"
    write(folder, {"memory.limit_in_bytes": "4096", "memory.usage_in_bytes": "3000"})
    write(folder, {"memory.stat": "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 3\n"})
    assert Devices.free_memory("cpu", tmp_path) == 4096 - 3000 + 23


def test_every_process_of_a_machine_holds_a_bank_on_a_cpu(monkeypatch):
    monkeypatch.setattr(Devices, "free_memory", lambda device: 200)
    assert Devices.is_held("auto", 100, "cpu")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not Devices.is_held("auto", 100, "cpu")
    assert Devices.is_held("auto", 50, "cpu")
