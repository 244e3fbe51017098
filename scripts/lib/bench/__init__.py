"""scripts/bench: measures real processes on loopback and prints one table."""
