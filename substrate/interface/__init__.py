"""How a substrate process is asked and how it answers: command line, task file, progress lines, exit codes."""
