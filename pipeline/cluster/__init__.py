"""Slurm and the site: submit jobs, ask about them, check a machine, forecast what a round takes."""
