"""The pipeline plans, starts, judges and decides. It never trains, and never imports torch, megatron or nemo.

    configuration -> plan of eight arms -> a Slurm array of workers, and a meta job that waits for them
    worker: verify the image, fork it, train in a sandbox, hash the adapter, judge it with the pristine image, write one result file
    meta:   eight result files -> ledger -> evidence -> decision under the constitution -> the next round's Hydra overrides

Stages exchange data through files alone. Each takes a folder of `runs/CAMPAIGN/`, writes one durable result, and can be run again by hand.
`campaign.layout.Campaign` names every path, and docs/contract.md describes the interface to `substrate/`. Start reading at `__main__`.
"""
