"""Tasks of a real Slurm: each step is a run of its own, whatever a shell left over.

Skipped where `srun` starts nothing; a Slurm on this host alone will do, SLURM_CONF names it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megadlcm.run_folder.rows import read_rows, training_rows
from tests.support.paths import ROOT
from tests.support.train_processes import START_SECONDS, write_run_file


def slurm_answers() -> bool:
    """Whether a Slurm is here that has idle nodes."""
    if shutil.which("srun") is None or shutil.which("sinfo") is None:
        return False
    words = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return False
    return found.returncode == 0 and found.stdout.strip() not in ("", "0")


pytestmark = [
    pytest.mark.slow(30),
    pytest.mark.skipif(
        not slurm_answers(),
        reason="no Slurm with an idle node; start one, and set SLURM_CONF to its slurm.conf",
    ),
]

# what this process's own Slurm or launcher says is not what these jobs are told
_OTHERS = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_")


def submit(script: str, *options: str, **environment: str) -> tuple[int, str]:
    """Runs a shell in an allocation; its exit code, and all that was said."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key == "SLURM_CONF" or not key.startswith(_OTHERS)
    }
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        ["salloc", "--quiet", *options, "bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3 * START_SECONDS,
        check=False,
        cwd=ROOT,
        env=inherited | own | {"PYTHON": sys.executable} | environment,
    )
    return done.returncode, done.stdout


def test_steps_of_a_job_are_runs_of_their_own(corpus: Path, tmp_path: Path) -> None:
    """Three at once: two of two tasks, and one of one task in which torchrun starts two."""
    names = ("first", "second", "torchrun")
    for name in names:
        write_run_file(
            tmp_path / f"{name}.yaml",
            corpus,
            tmp_path / name,
            training={"train_steps": 2, "global_batch_size": 4, "micro_batch_size": 1},
        )
    script = f"""
        cd {tmp_path}
        step() {{ srun --exact --nodes=1 "$@"; }}
        step --ntasks=2 $PYTHON -m megadlcm train first.yaml & first=$!
        step --ntasks=2 $PYTHON -m megadlcm train second.yaml & second=$!
        step --ntasks=1 $PYTHON -m torch.distributed.run --standalone --nproc-per-node=2 \\
            -m megadlcm train torchrun.yaml & last=$!
        wait $first && wait $second && wait $last
    """
    code, said = submit(script, "--nodes=1", "--ntasks=5")
    assert code == 0, said
    for name in names:
        rows = training_rows(read_rows(tmp_path / name))
        assert [(row["step"], row["world_size"]) for row in rows] == [(1, 2), (2, 2)], said


def test_ranks_that_a_shell_left_over_are_refused_by_every_task(
    corpus: Path, tmp_path: Path
) -> None:
    file = write_run_file(tmp_path / "run.yaml", corpus, tmp_path / "run")
    script = f"srun --ntasks=2 $PYTHON -m megadlcm train {file}"
    code, said = submit(script, "--nodes=1", "--ntasks=2", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: environment: RANK = 0 ")]
    assert sorted("SLURM_PROCID = 1" in line for line in lines) == [False, True], said
    assert not (tmp_path / "run").exists()


# prints the device that a task takes, on a host without GPUs
DEVICE = """
import json, os
import torch
from megadlcm.parallel.environment import choose_device, launch_environment

visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: len(visible)
launch = launch_environment()
try:
    device = visible[choose_device(launch).index]
except ValueError as error:
    device = str(error)
print("told:", json.dumps([launch.local_rank, len(visible), device]))
"""


def test_each_task_takes_the_gpu_that_slurm_gave_it(tmp_path: Path) -> None:
    program = tmp_path / "device.py"
    program.write_text(DEVICE, encoding="utf-8")
    gpus = subprocess.run(
        ["sinfo", "--noheader", "--format=%G"], capture_output=True, text=True, check=True
    ).stdout
    if "gpu:" not in gpus:
        pytest.skip("this Slurm knows no GPUs; start one whose nodes have two")
    script = f"""
        export PYTHONPATH={ROOT}; unset DS_ACCELERATOR
        for option in --gpus-per-task=1 --gpus-per-node=2 --gpus-per-node=1; do
            srun --ntasks=2 $option $PYTHON {program}
        done
    """
    code, said = submit(script, "--nodes=1", "--ntasks=2", "--gpus-per-node=2")
    assert code == 0, said
    told = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("told: ")]
    bound, shared, scarce = sorted(told[:2]), sorted(told[2:4]), sorted(told[4:])
    assert [number for _, number, _ in told] == [1, 1, 2, 2, 1, 1], said
    assert bound[0][2] != bound[1][2] and {device for *_, device in bound} <= {"0", "1"}
    assert shared == [[0, 2, "0"], [1, 2, "1"]]
    assert scarce[0] == [0, 1, "0"] and scarce[1][2].startswith("local rank 1: ")
