"""The exact statistics of a campaign. They use integers, rationals and decimals, so the same input gives the same digits on any machine."""
