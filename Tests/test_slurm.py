"""docs/slurm.sh, run by bash: srun, scontrol and torchrun are stand-ins that note what they are told."""

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT

STAND_INS = {
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> requeued; fi',
    # it goes on until SIGTERM, and then ends as torchrun does, or it ends with the code of END by itself
    "torchrun": 'echo "$@" >> started; trap "exit 1" TERM; [ -n "$END" ] && exit $END; while :; do sleep 0.01; done',
}
JOB = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}


@pytest.fixture
def job(tmp_path):
    """(end) -> .code .started .requeued of a job that gets SIGTERM, or whose run ends with the code `end`."""
    for name, line in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def text(name):
        return (tmp_path / name).read_text().splitlines() if (tmp_path / name).exists() else []

    def run_job(end=""):
        environment = os.environ | JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "END": end}
        command = ["bash", str(ROOT / "docs" / "slurm.sh"), "TrainISICLE.py", "--data", "a b"]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment)
        deadline = time.monotonic() + 30
        while not end and not text("started") and time.monotonic() < deadline:
            time.sleep(0.01)
        if not end:
            process.send_signal(signal.SIGTERM)
        return SimpleNamespace(code=process.wait(30), started=text("started"), requeued=text("requeued"))

    return run_job


def test_before_its_time_is_over_a_job_goes_back_into_the_queue(job):
    done = job()
    assert done.code == 0
    assert done.requeued == ["requeue 31234"]
    words = "--nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_id=31234 --rdzv_endpoint=node7:21234"
    assert done.started == [f"{words} TrainISICLE.py --data a b --resume auto"]


@pytest.mark.parametrize("end", ["0", "2"])
def test_a_run_that_ends_by_itself_ends_the_job(job, end):
    done = job(end)
    assert (done.code, done.requeued, len(done.started)) == (int(end), [], 1)
