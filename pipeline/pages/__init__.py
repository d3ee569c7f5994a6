"""Pages for people: a round, a campaign and a comparison, each as one HTML file that needs nothing else."""
