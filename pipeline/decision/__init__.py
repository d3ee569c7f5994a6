"""From the sealed log to a plan, a decision and the next policy. Pure functions, which the meta stage and the audit both run."""
