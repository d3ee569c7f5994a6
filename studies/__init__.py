"""Measure how good the decision is: simulated campaigns, critical values, simple policies beside ours. No campaign freezes this package."""
