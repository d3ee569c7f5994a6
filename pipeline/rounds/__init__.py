"""A campaign's life, round by round: init, freeze, launch, control, the meta stage, the next round, the end."""
