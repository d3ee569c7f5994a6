"""A campaign on disk: its records, paths, files, sealed log, keys, rules and frozen facts. Every other package builds on this one."""
