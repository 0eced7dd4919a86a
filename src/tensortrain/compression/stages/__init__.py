"""What can be done to a model, one stage a file: factorize, heal, and what follows."""
