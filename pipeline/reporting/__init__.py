"""What people read: the state of a round, the page of a decision with its figures, and what a configuration costs."""
