"""Multi-objective neural architecture search by Lamarckian evolution (LEMONADE)."""

__version__ = "0.1.0"
