"""What the command line does. Programs use the trainers themselves."""
