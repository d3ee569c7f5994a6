"""How good the decision rule is: simulated campaigns, critical values, other policies beside ours. Not frozen with a campaign."""
