"""Slurm and the site: submit jobs, ask for their states, check a machine, and forecast what a round costs."""
