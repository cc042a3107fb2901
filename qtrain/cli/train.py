"""`qtrain train`: train a model, or several; see `qtrain.train`."""

import os
import re
import signal
import sys
from pathlib import Path


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        from qtrain.train import help_text

        text = help_text(sys.argv[1:])
        if Path(sys.argv[0]).name != "train.py":  # three letters shorter, which keeps the columns
            text = re.sub(r"python train\.py(.*?)(?=  )", r"qtrain train\1   ", text).replace(
                "python train.py", "qtrain train"
            )
        print(text)
        return
    from qtrain.training.stop import CODES, heard

    for number in heard():  # while the imports run; then qtrain.train listens
        signal.signal(number, lambda number, _: os._exit(CODES[signal.Signals(number)]))
    from qtrain.train import main as run  # here, so that processes which prepare data import none of it

    run()


if __name__ == "__main__":
    main()
