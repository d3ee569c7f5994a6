"""How a process of the image is asked and answers: command line, task file, progress lines, exit codes."""
