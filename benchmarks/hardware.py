"""What a benchmark runs on: a name for its file, the facts for its page, and its clock."""

import datetime
import platform
import re
import time
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


class Clock:
    """Seconds of the processor on one CPU thread, which other work on the machine does not lengthen; else of the clock.
    """

    def __init__(self, device: torch.device):
        self.device, self.own = device, device.type == "cpu" and torch.get_num_threads() == 1

    def now(self) -> float:
        """Seconds, when all work given to the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.process_time() if self.own else time.perf_counter()
