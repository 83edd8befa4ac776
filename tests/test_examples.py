import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_ones_own_networks_train_sample_and_load(tmp_path: Path):
    words = [str(EXAMPLES / "own_networks.py"), "--steps", "4", "--out", str(tmp_path / "run")]
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "64 images of (1, 32, 32); 4 steps" in result.stdout
    assert (tmp_path / "run" / "generator.safetensors").exists()
