"""Attack the training scripts: kill them, damage their files, fill their disks, start them twice; count what they survive.

    python -m Benchmarks.Soak            # all tries, about an hour on two cores; table on screen, Results/soak.json
    python -m Benchmarks.Soak --quick    # a tenth of them

Runs are tiny, and are forks of this process, which has imported everything: each starts at once. A try passes if, after
all restarts, the run ends in the same bits as one that was left alone: every tensor of every checkpoint, every line of
metrics.jsonl but for times, the scores, the bank; and if no scratch file is left. Results are written after every try;
started again, it continues. It needs Linux; full disks are small file systems in memory, which only root may mount.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import Flags
import Runs
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Benchmarks.Attacked import CAMNET, Child, draw_images, flags_of, is_one_line, problem_of, state_of

SCRIPTS = {"SimCLR": TrainSimCLR, "ISICLE": TrainISICLE, "CamNet": TrainCamNet}
LONG = {  # flags of a run that does not end before it is killed
    "SimCLR": ["--epochs", "2000"],
    "ISICLE": ["--epochs", "2000"],
    "CamNet": ["--periods", "2000"],
}
