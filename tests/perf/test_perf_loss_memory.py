"""The benchmark of the vocabulary loss, tiny: it compares, times, and writes what it says."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "loss_memory.py"


def test_chunks_take_less_memory(tmp_path):
    path = tmp_path / "out.json"
    names = ["gpt2-4x512-float32", "gpt2-8x1024-bfloat16"]
    command = [sys.executable, str(SCRIPT), "--smoke", "--repeats", "2", "--chunk-size", "64"]
    done = subprocess.run(
        [*command, "--cases", *names, "--json", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    doc = json.loads(path.read_text())
    assert [(row["case"], row["loss"]) for row in doc["rows"]] == [
        (name, loss) for name in names for loss in ("plain", "chunked")
    ]
    timed, compiled = doc["rows"][1], doc["rows"][3]
    assert len(timed["seconds"]["all"]) == 2
    assert timed["max_difference"] < 1e-5
    assert compiled["seconds"] is None
    for name in names:
        assert doc["ratios"][name]["temporary_bytes"] > 2
    assert doc["rows"][0]["temporary_bytes"] >= doc["rows"][0]["logits_bytes"]
    wrong = subprocess.run([*command, "--cases", "huge"], capture_output=True, text=True)
    assert "unknown cases ['huge']" in wrong.stderr
