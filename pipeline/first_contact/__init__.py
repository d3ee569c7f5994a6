"""First contact with a site: gates that a new site passes one after the other, the cheapest first, before its first round."""
