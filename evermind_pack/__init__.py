"""Models, trainers and the command line of evermind-pack."""
