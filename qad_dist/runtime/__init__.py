"""Where a program runs: command line, world, collectives, engine, logs, records of stages."""
