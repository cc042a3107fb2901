"""Train a small model under random faults and compare what comes out with a run that nothing disturbed.

python scripts/chaos.py --faults 200 --seed 1 --out chaos
python scripts/chaos.py --faults 50 --ranks 2 --out chaos2

Stopped, the same command goes on. It ends with status 1 unless every fault was survived.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qtrain.studies.chaos import Chaos, Fault, kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; it can be deleted afterwards")
    parser.add_argument("--faults", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order and places (default: 0)")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="processes that train (default: 1)")
    parser.add_argument("--kinds", nargs="+", help="kinds of faults (default: all)")
    arguments = parser.parse_args()
    names = arguments.kinds or list(kinds(arguments.ranks))
    unknown = [name for name in names if name not in kinds(arguments.ranks)]
    if unknown:
        sys.exit(f"error: --kinds {unknown[0]!r} is unknown; there are: {', '.join(kinds(arguments.ranks))}")
    chaos = Chaos(arguments.out.resolve(), arguments.seed, arguments.ranks, names)
    chaos.run(arguments.faults, show)
    print(chaos.table())
    for fault in chaos.state.faults:
        if fault.outcome != "survived":
            print(f"fault {fault.number} ({fault.kind}, {fault.detail}): {fault.outcome}: {fault.said}")
    sys.exit(0 if chaos.survived else 1)


def show(fault: Fault) -> None:
    print(f"{fault.number:4} {fault.kind}: {fault.detail} {fault.outcome} ({fault.seconds} s)", flush=True)


if __name__ == "__main__":
    main()
