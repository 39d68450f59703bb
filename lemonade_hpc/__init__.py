"""lemonade_hpc: multi-objective neural architecture search by Lamarckian evolution (LEMONADE), for Slurm and laptops."""

__version__ = "0.1.0"
