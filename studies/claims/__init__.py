"""How far claims can be believed: the error rates and the power of "an improvement", "shown to be worse" and the canaries, simulated."""
