"""``python -m mgpu`` is the command ``mgpu-launch``."""

from mgpu.launch.cli import main

if __name__ == "__main__":
    main()
