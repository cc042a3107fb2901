import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while the imports run; then qtrain.train listens

from qtrain.train import main  # noqa: E402

if __name__ == "__main__":
    main()
