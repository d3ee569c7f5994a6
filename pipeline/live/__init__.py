"""A round while it runs: what `status --watch` and a running `round` show, and how long what is left will take."""
