"""Commands that are hurt while they run, and run again: a seeded plan of faults over all stages, and what became of it."""
