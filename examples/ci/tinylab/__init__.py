"""A lab's own package: a small residual network and the data that it is trained on."""
