"""Fine-tunes one pretrained model in every way, at an equal budget, and adds a row for each run to results.csv. It goes
on where it was stopped: a run whose row is there is not done again.

python experiments/finetune/run.py BASE signatures.jsonl --seeds 0 1 2 --out runs/finetune
BASE: a Hugging Face checkpoint; signatures.jsonl: of data.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Method -> (its settings, the learning rates that were tried; the first is the one of the table).
METHODS: dict[str, tuple[list[str], list[str]]] = {
    "full": (["recipe=bf16"], ["1e-3", "3e-4"]),
    "lora": (["recipe=bf16", "+tune=lora"], ["3e-3", "1e-3"]),
    "qlora": (["recipe=nf4", "+tune=qlora", "tune.adapter.rank=16", "tune.adapter.alpha=32"], ["3e-3", "1e-3"]),
    "halo": (["recipe=halo_2"], ["1e-3", "3e-4"]),
    "peqa": (["recipe=bf16", "+tune=peqa"], ["3e-4", "1e-4"]),
    "pv": (["recipe=bf16", "+tune=pv"], ["3e-4", "1e-4"]),
    "quest": (["recipe=quest"], ["1e-3", "3e-4"]),
    "qad": (["recipe=quest", "+tune=qad", "tune.teacher.weight=0.5"], ["1e-3", "3e-4"]),
    "efqat": (["recipe=quest", "+tune=efqat", "tune.rows.refresh_samples=256"], ["1e-3", "3e-4"]),
}
EQUAL = [
    "data=chat",
    "data.val_tokens=65536",
    "model.seq_len=256",
    "trainer.tokens=262144",
    "trainer.batch_tokens=2048",
    "trainer.micro_batch_size=8",
    "trainer.device=cpu",
    "trainer.precision=32-true",
    "callbacks.progress_bar=false",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sweep", action="store_true", help="every learning rate, not the table's alone")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    asked = parser.parse_args()
    for seed in asked.seeds:
        for method in asked.methods:
            settings, rates = METHODS[method]
            for rate in rates if asked.sweep else rates[:1]:
                command = [
                    *(sys.executable, "train.py", "+experiment=finetune", f"model=hf:{asked.base}", *settings, *EQUAL),
                    *(f"data.files={asked.data}", f"name={method}-{rate}", f"optimizer.lr={rate}", f"seed={seed}"),
                    *(f"run_root={asked.out}", f"results={HERE / 'results.csv'}"),
                ]
                print(" ".join(command), flush=True)
                subprocess.run(command, check=True, cwd=HERE.parents[1])


if __name__ == "__main__":
    main()
