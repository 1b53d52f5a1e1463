"""The tests on a GPU, in processes of their own: this one has hidden the GPU from itself, see conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

GPUS = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]  # dxg: in Windows' Linux


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_the_tests_on_the_gpu_pass():
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "4", "Tests/test_cuda.py"]
    environment = os.environ | {"ISICLE_TEST_GPU": "yes"}
    del environment["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]
