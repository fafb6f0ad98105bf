"""What is trained and where it lives: parameters, operators, objectives, checkpoints."""
