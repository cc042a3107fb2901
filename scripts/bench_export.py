"""Memory and time that `qtrain export` takes, beside the size of what it writes.

python scripts/bench_export.py --model 1.1b --to hf compressed-tensors gguf

A run of random parameters, 134 million or 1.1 billion (TinyLlama's shape), whose recipe w4a16 has 4-bit weights that
all of these formats hold, is exported by a new process for each format. Its peak is VmHWM of /proc/self/status, which
counts everything: the libraries, and the pages of the checkpoint that are mapped. The first line is a process that
imports torch and does nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_generation import MODELS, write_run

FORMATS = ("hf", "compressed-tensors", "gguf")
EXPORT = "from qtrain.cli.export import main; main()"
PEAK = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="134m")
    parser.add_argument("--to", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--folder", type=Path, help="on a disk with room for the run and the exports")
    arguments = parser.parse_args()
    print(f"{'':<20}{'file, MiB':>12}{'peak, MiB':>12}{'peak / file':>14}{'seconds':>10}", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_run(Path(folder) / "run", MODELS[arguments.model], "w4a16")
        peak, seconds = measured("import torch")
        print(f"{'import torch':<20}{'':>12}{peak / 2**20:>12,.0f}{'':>14}{seconds:>10.1f}", flush=True)
        for format in arguments.to:
            out = Path(folder) / format
            peak, seconds = measured(EXPORT, f"{folder}/run", "--to", format, "--out", str(out))
            size = sum(file.stat().st_size for file in out.iterdir())
            numbers = f"{size / 2**20:>12,.0f}{peak / 2**20:>12,.0f}{peak / size:>14.2f}{seconds:>10.1f}"
            print(f"{format:<20}{numbers}", flush=True)


def measured(code: str, *arguments: str) -> tuple[int, float]:
    """(peak in bytes, seconds) of a Python program."""
    start = time.perf_counter()
    command = [sys.executable, "-c", f"{code}\n{PEAK}", *arguments]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return 1024 * int(said.split()[-1]), time.perf_counter() - start


if __name__ == "__main__":
    main()
