"""The tests on the pretend device, in a process of their own: the device changes torch for all that follows."""

import subprocess
import sys

import torch
from helpers import ROOT

from Benchmarks import Kernels


def test_its_import_changes_nothing():
    """Where torch knows another device, a process that has computed gradients cannot fork, as the tests do."""
    assert Kernels.PretendCuda
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"


def test_the_tests_on_the_pretend_device_pass():
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "Tests/test_pretend_device.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]
