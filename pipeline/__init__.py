"""The pipeline orchestrates and judges; it never trains and never imports torch, megatron or nemo.

    configuration -> plan of eight arms -> one Slurm array of workers + one dependent meta job
    worker: verify the image, fork it, train in a sandbox, hash the adapter, judge with the pristine image, write one result file
    meta:   eight files -> ledger -> evidence -> decision under the constitution -> the next round's Hydra overrides

Data flows one way and through files: every stage takes a folder of `runs/<campaign>/`, writes one durable result, and can be run
again by hand. `layout.Campaign` names every path; `docs/contract.md` is the wall to `substrate/`. Start reading at `__main__`.
"""
