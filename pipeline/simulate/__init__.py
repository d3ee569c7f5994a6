"""Simulated campaigns, and the rule run over them: what the false alarms, the power and the critical values are measured with.

    model    worlds (what may happen to a dev score) and whole campaigns in them, item by item, many at once
    twin     the rule of pipeline.gaptest and pipeline.boardtest over arrays of campaigns; same decisions, a thousand times as fast
    policies how a round's winner and the final model are chosen, and what that costs
    table    the scenarios of the report: alarms by round, regret, and what the design expected

Only this package draws random numbers or uses numpy for a decision; no verdict of a campaign rests on it, but the critical values do.
"""
