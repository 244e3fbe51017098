"""The small process that watches over one command: it starts the shell, keeps its output and its end on disk, and stops
all of it when asked or when the time is over. It outlives the agent, which finds it again by its directory.

Standard library only, and little of it: one such process runs for each command. It imports nothing of the agent but
`process_table`, and nothing late: the version it was started from may be gone before it ends."""
