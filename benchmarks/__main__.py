"""``python -m benchmarks``."""

from benchmarks.benchmark import main

if __name__ == "__main__":
    main()
