"""Where results go: `python -m bench.folders` prints this GPU's folder. Needs no built kernels."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def results_folder(device_name: str) -> Path:
    """bench/results/<device>, in letters that any file system takes."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


if __name__ == "__main__":
    print(results_folder(torch.cuda.get_device_name()))
