"""Pure functions that derive a plan, a decision and the next policy from the sealed log. The meta stage and the audit run the same ones."""
