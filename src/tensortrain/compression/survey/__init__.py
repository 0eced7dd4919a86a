"""What a model is made of: its layers, what can be done to each, what flows through them."""
