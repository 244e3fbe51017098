"""scripts/chaos: commands must survive kills, freezes and cut links, and a checker who knows the truth says whether."""
