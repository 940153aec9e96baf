"""One file per program: builds the parts from the config, connects and runs them. Stages never import each other."""
