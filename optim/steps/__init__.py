"""What a step is made of: direction, forward and backward passes, step limits, the recursions that bound them."""
