"""From a MovieLens download to recommendations, by the commands that a person types; killed once on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parent / "data"))
from synthetic import write_movielens_1m

SETTINGS = [
    "--preset", "ml", "--channels", "8", "--dilations", "1,2", "--first-epochs", "2", "--later-epochs", "2",
    "--batch-size", "32", "--lr", "0.01", "--checkpoint-every-steps", "3", "--no-tensorboard", "--no-report",
    "--threads", "1",
]  # fmt: skip


def teracon(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "teracon_fast", *map(str, arguments)]


def run(*arguments: str | Path) -> str:
    wide = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(teracon(*arguments), capture_output=True, text=True, check=False, env=wide)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_six_tasks_of_movielens(tmp_path: Path) -> None:
    raw, data = write_movielens_1m(tmp_path / "ml-1m", users=60), tmp_path / "data"
    run("prepare", "movielens", raw, "--output", data)
    run("train", *SETTINGS, "--data", data, "--run", tmp_path / "whole")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert [len(row) for row in results["R"]] == [1, 2, 3, 4, 5, 6]
    assert results["bwt"][-1] == 0

    killed = tmp_path / "killed"
    process = subprocess.Popen(teracon("train", *SETTINGS, "--data", data, "--run", killed), stdout=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "task2.safetensors").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    resumed = run("train", *SETTINGS, "--data", data, "--run", killed)
    assert "T1 of 6" not in resumed and "T6 of 6" in resumed, "finished tasks are not trained again"
    assert (killed / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    last = "checkpoints/task6.safetensors"
    assert (killed / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()

    assert "occupation" in run("evaluate", killed)
    run("recommend", killed, "--task", "2", "--top-k", "5", "--input", data, "--output", tmp_path / "top.parquet")
    run("predict", killed, "--task", "4", "--input", data, "--output", tmp_path / "gender.parquet")
    run("embed", killed, "--task", "all", "--input", data, "--output", tmp_path / "users.parquet")
    users = pq.read_table(tmp_path / "users.parquet")
    assert users.num_rows == pq.read_table(tmp_path / "top.parquet").num_rows == 60
    assert sum("task" in name for name in users.column_names) == 6, users.column_names
    assert (tmp_path / "gender.parquet").exists()
