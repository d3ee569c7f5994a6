"""One agent's arm: what its tools do in the fork, and what its edits are. Its model's answers and its files are not believed."""
