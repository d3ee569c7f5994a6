"""What the jobs of a round ask of Slurm in tests: the smallest request, and a round whose roles all ask for it."""

from pipeline.cluster.sbatch_parameters import Resources
from pipeline.config.requests import ROLES, Request

CPU = Request(
    partition="", account="", qos="", reservation="", constraint="", gpus_per_node=0, cpus_per_task=2, time_limit_minutes=30
)  # fmt: skip
SMALL = Resources("demo-r0001", dict.fromkeys(ROLES, CPU), 30)
