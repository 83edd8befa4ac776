"""What a result was measured on, and where it is written."""

import datetime
import os
import platform
import re
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def processor():
    """The processor's name, as the system tells it."""
    cpu_info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def hardware():
    """One line: processor, cores, threads, GPU if any, versions."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; {datetime.date.today()}"
    )


def write_result(theme, text, *, device="cpu"):
    """Write ``results/<theme>_<hardware>_<date>.md`` and return its path."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}-{os.cpu_count()}-cores"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = RESULTS / f"{theme}_{slug}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
