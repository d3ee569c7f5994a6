"""One agent's arm: the relay to its model, its tools in the fork, and what its edits are. Nothing that it says or writes is believed."""
