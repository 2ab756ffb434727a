"""The random model of benchmarks, for tests."""

from bench.random_model import write_random_model

__all__ = ["write_random_model"]
