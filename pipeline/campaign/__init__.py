"""What a campaign is on disk: its records, paths, files, sealed log, keys, rules and frozen facts. Everything else rests on this."""
