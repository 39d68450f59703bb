"""Slurm's commands for what runs inside an image: `helper.py` is outside, `shim.py` inside."""
