"""What a benchmark ran on: a name for its file, and the facts for its page."""

import datetime
import platform
import re
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's model name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def name(device: torch.device) -> str:
    """For file names: "cpu1-amd-epyc" (one thread), "nvidia-h100-80gb-hbm3"."""
    shown = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    slug = re.sub(r"[^a-z0-9]+", "-", shown.lower().replace("processor", "")).strip("-")
    return f"cpu{torch.get_num_threads()}-{slug}" if device.type == "cpu" else slug


def facts(device: torch.device) -> dict[str, str | int]:
    """Hardware, threads, versions and month."""
    return {
        "hardware": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "month": month(),
    }


def month() -> str:
    """YYYYMM, for file names."""
    return datetime.date.today().strftime("%Y%m")
