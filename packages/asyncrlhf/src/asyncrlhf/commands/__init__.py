"""What the command line does. Programs use :class:`asyncrlhf.AsyncRLHFTrainer` itself."""
