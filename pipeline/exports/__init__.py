"""What a campaign's files say, for other tools and side by side. Nothing here decides, and nothing here writes into a campaign."""
