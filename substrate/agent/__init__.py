"""The agent's loop: it asks a language model, through the worker's socket, to work on one arm, and carries out the tools that it calls.

    task.py            the task file                     context.py, stack.py   the first messages, and the stack's interface in them
    socket_client.py   the worker's socket               tool_schemas.py        the eight tools, and the check of their arguments
    answers.py         reads the model's answers         conversation.py        what is sent again with each request, within a bound
    watchdog.py        ends loops without progress       loop.py                one session from the first request to its end

It runs from the pristine image in a sandbox that has the socket and nothing else, and needs the standard library alone (docs/contract.md,
kind `agent`). What it edits is the fork of the arm's trial, to which it has no way but the tools.
"""
