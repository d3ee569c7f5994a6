"""What people look at: the state of a round, the page of a decision, its figures, what a configuration costs."""
