"""Multi-objective neural architecture search by Lamarckian evolution (LEMONADE), for Slurm clusters and laptops."""

__version__ = "0.1.0"
