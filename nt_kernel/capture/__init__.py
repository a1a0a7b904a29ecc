"""One pass over a model: which calls its parameters enter, and what each call saw and received (one file per kind of call)."""
